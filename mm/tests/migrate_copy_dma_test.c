// SPDX-License-Identifier: GPL-2.0
/*
 * A DMA engine that is none: a CPU copies. It can be told to fail, which devices do
 * too rarely to test who uses them.
 *
 * In /sys/kernel/debug/migrate_copy_dma_test/:
 *
 * mode		what happens to descriptors:
 *	ok	they are copied and completed
 *	error	they are completed with an error, and have not been copied
 *	reverse	those that are begun at once are completed from the last to the first
 *	slow	each takes 5 ms more
 *	lost	they are never completed; the device can be stopped
 *	hang	they are not completed, and the device can not be stopped
 * nth		this happens to each nth descriptor only
 * final	0: if the device can not be stopped, the driver says that it was, as many
 *		do that do not claim terminate_is_final
 * release	write 1: those that hang are copied and completed
 * descriptors	how many have been copied and completed
 *
 * The driver can be unbound from its device, migrate-copy-dma-test.0, at any time.
 */
#include <linux/atomic.h>
#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/dma-direct.h>
#include <linux/dma-map-ops.h>
#include <linux/dma-mapping.h>
#include <linux/dmaengine.h>
#include <linux/err.h>
#include <linux/init.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/platform_device.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

#include "../../drivers/dma/dmaengine.h"

#define NAME		"migrate-copy-dma-test"
#define NR_CHANNELS	4

struct test_desc {
	struct dma_async_tx_descriptor tx;
	struct list_head node;
	dma_addr_t dst;
	dma_addr_t src;
	size_t len;
};

struct test_chan {
	struct dma_chan chan;
	/* Its lists, and its cookie. */
	spinlock_t lock;
	struct list_head submitted;
	struct list_head issued;
	struct list_head stuck;
	bool hangs;
	bool stops;
	/* Who completes those that are stuck. */
	struct mutex release_mutex;
	struct work_struct work;
};

struct test_device {
	struct dma_device dma;
	struct test_chan chans[NR_CHANNELS];
};

enum mode { MODE_OK, MODE_ERROR, MODE_REVERSE, MODE_SLOW, MODE_LOST, MODE_HANG };

static const char * const mode_names[] = {
	[MODE_OK]	= "ok",
	[MODE_ERROR]	= "error",
	[MODE_REVERSE]	= "reverse",
	[MODE_SLOW]	= "slow",
	[MODE_LOST]	= "lost",
	[MODE_HANG]	= "hang",
};

static enum mode mode;
static u32 nth = 1;
static bool final = true;
static atomic_t begun = ATOMIC_INIT(0);
static atomic_t descriptors = ATOMIC_INIT(0);
/* The one that is bound, or NULL. */
static struct test_device *the_device;
static DEFINE_MUTEX(device_mutex);

static struct test_chan *to_test_chan(struct dma_chan *chan)
{
	return container_of(chan, struct test_chan, chan);
}

static void free_list(struct list_head *list)
{
	struct test_desc *desc, *next;

	list_for_each_entry_safe(desc, next, list, node)
		kfree(desc);
	INIT_LIST_HEAD(list);
}

/*
 * A device reads what it has been given, late, if it has been free since then: be
 * that poisoned by KASAN, or unmapped by DEBUG_PAGEALLOC.
 */
static void copy(const struct test_desc *desc)
{
	struct device *dev = desc->tx.chan->device->dev;
	void *to = phys_to_virt(dma_to_phys(dev, desc->dst));
	void *from = phys_to_virt(dma_to_phys(dev, desc->src));
	size_t at;

	for (at = 0; at < desc->len; at += PAGE_SIZE)
		copy_from_kernel_nofault(to + at, from + at, PAGE_SIZE);
}

static void complete_desc(struct test_desc *desc, enum dmaengine_tx_result error)
{
	const struct dmaengine_result result = { .result = error };
	struct test_chan *tc = to_test_chan(desc->tx.chan);

	if (error == DMA_TRANS_NOERROR) {
		copy(desc);
		atomic_inc(&descriptors);
	}
	spin_lock_irq(&tc->lock);
	dma_cookie_complete(&desc->tx);
	spin_unlock_irq(&tc->lock);
	dmaengine_desc_get_callback_invoke(&desc->tx, &result);
	kfree(desc);
}

/* Unless the channel has been said to stop. */
static void get_stuck(struct test_chan *tc, struct test_desc *desc, bool hangs)
{
	guard(spinlock_irq)(&tc->lock);
	if (tc->stops) {
		kfree(desc);
		return;
	}
	list_add_tail(&desc->node, &tc->stuck);
	tc->hangs |= hangs;
}

static void run_desc(struct test_chan *tc, struct test_desc *desc)
{
	const u32 n = READ_ONCE(nth) ?: 1;
	const enum mode m = atomic_inc_return(&begun) % n ? MODE_OK : READ_ONCE(mode);

	switch (m) {
	case MODE_ERROR:
		complete_desc(desc, DMA_TRANS_WRITE_FAILED);
		break;
	case MODE_LOST:
	case MODE_HANG:
		get_stuck(tc, desc, m == MODE_HANG);
		break;
	case MODE_SLOW:
		usleep_range(5000, 6000);
		fallthrough;
	default:
		complete_desc(desc, DMA_TRANS_NOERROR);
	}
}

static void reverse(struct list_head *list)
{
	struct list_head *pos, *next;

	list_for_each_safe(pos, next, list)
		list_move(pos, list);
}

static void run(struct work_struct *work)
{
	struct test_chan *tc = container_of(work, struct test_chan, work);
	struct test_desc *desc, *next;
	LIST_HEAD(list);

	spin_lock_irq(&tc->lock);
	list_splice_tail_init(&tc->issued, &list);
	spin_unlock_irq(&tc->lock);
	if (READ_ONCE(mode) == MODE_REVERSE)
		reverse(&list);
	list_for_each_entry_safe(desc, next, &list, node) {
		list_del(&desc->node);
		run_desc(tc, desc);
	}
}

static void release_stuck(struct test_chan *tc)
{
	struct test_desc *desc, *next;
	LIST_HEAD(list);

	guard(mutex)(&tc->release_mutex);
	spin_lock_irq(&tc->lock);
	list_splice_tail_init(&tc->stuck, &list);
	tc->hangs = false;
	spin_unlock_irq(&tc->lock);
	list_for_each_entry_safe(desc, next, &list, node) {
		list_del(&desc->node);
		complete_desc(desc, DMA_TRANS_NOERROR);
	}
}

/*
 * What a DMA engine has to do
 */

static dma_cookie_t test_submit(struct dma_async_tx_descriptor *tx)
{
	struct test_desc *desc = container_of(tx, struct test_desc, tx);
	struct test_chan *tc = to_test_chan(tx->chan);

	guard(spinlock_irqsave)(&tc->lock);
	list_add_tail(&desc->node, &tc->submitted);
	return dma_cookie_assign(tx);
}

static struct dma_async_tx_descriptor *
test_prep(struct dma_chan *chan, dma_addr_t dst, dma_addr_t src, size_t len,
	  unsigned long flags)
{
	struct test_desc *desc = kzalloc_obj(*desc, GFP_NOWAIT);

	if (!desc)
		return NULL;
	dma_async_tx_descriptor_init(&desc->tx, chan);
	desc->tx.tx_submit = test_submit;
	desc->tx.flags = flags;
	desc->dst = dst;
	desc->src = src;
	desc->len = len;
	return &desc->tx;
}

static void test_issue_pending(struct dma_chan *chan)
{
	struct test_chan *tc = to_test_chan(chan);

	guard(spinlock_irqsave)(&tc->lock);
	list_splice_tail_init(&tc->submitted, &tc->issued);
	queue_work(system_dfl_wq, &tc->work);
}

static enum dma_status test_tx_status(struct dma_chan *chan, dma_cookie_t cookie,
				      struct dma_tx_state *state)
{
	return dma_cookie_status(chan, cookie, state);
}

static void test_synchronize(struct dma_chan *chan)
{
	struct test_chan *tc = to_test_chan(chan);

	flush_work(&tc->work);
	guard(mutex)(&tc->release_mutex);
	guard(spinlock_irq)(&tc->lock);
	tc->stops = false;
}

static int test_terminate_all(struct dma_chan *chan)
{
	struct test_chan *tc = to_test_chan(chan);

	guard(spinlock_irqsave)(&tc->lock);
	if (tc->hangs)
		return chan->device->terminate_is_final ? -EBUSY : 0;
	tc->stops = true;
	free_list(&tc->submitted);
	free_list(&tc->issued);
	free_list(&tc->stuck);
	return 0;
}

static int test_alloc_chan_resources(struct dma_chan *chan)
{
	dma_cookie_init(chan);
	return 1;
}

static void test_free_chan_resources(struct dma_chan *chan)
{
	struct test_chan *tc = to_test_chan(chan);

	cancel_work_sync(&tc->work);
	tc->hangs = false;
	test_terminate_all(chan);
	tc->stops = false;
}

static void test_device_release(struct dma_device *dma)
{
	kfree(container_of(dma, struct test_device, dma));
}

static void init_chan(struct test_device *device, struct test_chan *tc)
{
	spin_lock_init(&tc->lock);
	mutex_init(&tc->release_mutex);
	INIT_LIST_HEAD(&tc->submitted);
	INIT_LIST_HEAD(&tc->issued);
	INIT_LIST_HEAD(&tc->stuck);
	INIT_WORK(&tc->work, run);
	tc->chan.device = &device->dma;
	list_add_tail(&tc->chan.device_node, &device->dma.channels);
}

static int test_probe(struct platform_device *pdev)
{
	struct test_device *device = kzalloc_obj(*device);
	struct dma_device *dma;
	int i, err;

	if (!device)
		return -ENOMEM;
	dma = &device->dma;
	dma->dev = &pdev->dev;
	INIT_LIST_HEAD(&dma->channels);
	for (i = 0; i < NR_CHANNELS; i++)
		init_chan(device, &device->chans[i]);
	dma_cap_set(DMA_MEMCPY, dma->cap_mask);
	dma_cap_set(DMA_PRIVATE, dma->cap_mask);
	dma->device_alloc_chan_resources = test_alloc_chan_resources;
	dma->device_free_chan_resources = test_free_chan_resources;
	dma->device_prep_dma_memcpy = test_prep;
	dma->device_issue_pending = test_issue_pending;
	dma->device_tx_status = test_tx_status;
	dma->device_terminate_all = test_terminate_all;
	dma->device_synchronize = test_synchronize;
	dma->device_release = test_device_release;
	dma->terminate_is_final = final;
	/* A CPU writes, and has it in its caches. */
	err = dev_is_dma_coherent(&pdev->dev) ? 0 : -EOPNOTSUPP;
	err = err ?: dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(64));
	err = err ?: dma_async_device_register(dma);
	if (err) {
		kfree(device);
		return err;
	}
	platform_set_drvdata(pdev, device);
	guard(mutex)(&device_mutex);
	the_device = device;
	return 0;
}

static void test_remove(struct platform_device *pdev)
{
	struct test_device *device = platform_get_drvdata(pdev);

	mutex_lock(&device_mutex);
	the_device = NULL;
	mutex_unlock(&device_mutex);
	dma_async_device_unregister(&device->dma);
}

static struct platform_driver test_driver = {
	.probe	= test_probe,
	.remove	= test_remove,
	.driver	= { .name = NAME },
};

/*
 * What it is to do
 */

static ssize_t mode_read(struct file *file, char __user *to, size_t count, loff_t *pos)
{
	char buf[16];
	const int len = scnprintf(buf, sizeof(buf), "%s\n", mode_names[READ_ONCE(mode)]);

	return simple_read_from_buffer(to, count, pos, buf, len);
}

static ssize_t mode_write(struct file *file, const char __user *from, size_t count,
			  loff_t *pos)
{
	char buf[16];
	ssize_t len = simple_write_to_buffer(buf, sizeof(buf) - 1, pos, from, count);
	int i;

	if (len < 0)
		return len;
	buf[len] = 0;
	i = sysfs_match_string(mode_names, buf);
	if (i < 0)
		return i;
	WRITE_ONCE(mode, i);
	return count;
}

static const struct file_operations mode_fops = {
	.open	= simple_open,
	.read	= mode_read,
	.write	= mode_write,
};

static int release_set(void *data, u64 value)
{
	int i;

	guard(mutex)(&device_mutex);
	for (i = 0; the_device && i < NR_CHANNELS; i++)
		release_stuck(&the_device->chans[i]);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(release_fops, NULL, release_set, "%llu\n");

static int final_set(void *data, u64 value)
{
	guard(mutex)(&device_mutex);
	final = value;
	if (the_device)
		the_device->dma.terminate_is_final = final;
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(final_fops, NULL, final_set, "%llu\n");

static int __init migrate_copy_dma_test_init(void)
{
	struct dentry *dir = debugfs_create_dir("migrate_copy_dma_test", NULL);
	struct platform_device *pdev;
	int err;

	debugfs_create_file("mode", 0600, dir, NULL, &mode_fops);
	debugfs_create_u32("nth", 0600, dir, &nth);
	debugfs_create_file_unsafe("release", 0200, dir, NULL, &release_fops);
	debugfs_create_file_unsafe("final", 0200, dir, NULL, &final_fops);
	debugfs_create_atomic_t("descriptors", 0400, dir, &descriptors);
	err = platform_driver_register(&test_driver);
	if (err)
		return err;
	pdev = platform_device_register_simple(NAME, 0, NULL, 0);
	return PTR_ERR_OR_ZERO(pdev);
}
late_initcall(migrate_copy_dma_test_init);
