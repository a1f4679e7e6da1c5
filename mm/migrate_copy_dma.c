// SPDX-License-Identifier: GPL-2.0
/*
 * Copy the folios of a batch with a DMA engine.
 *
 * While this is switched on, up to 16 channels of devices that copy memory belong
 * to it. A batch takes the free ones, those near the destination first, and gives
 * them back when it has ended; if there is none, folios are copied as they are
 * moved. A large folio is mapped once, and copied in parts, one to a channel. Who
 * migrates sleeps until all parts of the next folio are there, and begins with
 * others then: a channel has a few at a time, as some drivers sleep until there is
 * room for another one.
 *
 * A folio that can not be mapped or queued, or whose copy the device says has
 * failed, is copied by who migrates it: the device has stopped writing to it.
 *
 * If a device does not answer
 *
 * After dma_timeout_ms, a driver that can be believed (terminate_is_final) is asked
 * to stop the channel. If it does, nobody writes to its destinations any more, and
 * the folios are copied by who migrates. Most drivers just forget what they were
 * asked to do, callbacks included: those are not asked. The device may write later,
 * at any time:
 *
 * (1) The folio's copy is abandoned, under the lock of the batch, which a callback
 *     takes as well: either it is complete, or the callback knows it is abandoned.
 * (2) An abandoned destination has a reference of ours. The folio fails to be
 *     migrated for now: who migrates frees his destination, which does not become
 *     free by that, and uses another one if he tries again. It is never written to
 *     by a CPU.
 * (3) Both mappings stay: the device must not write to what an IOMMU, or a bounce
 *     buffer, have been given to somebody else for. The source is only read. It can
 *     be used and even freed: what is read from it does not matter.
 * (4) The channel is not used again until all callbacks have come, or it has been
 *     stopped, which is tried when the engine is switched on, off, or the driver is
 *     unbound.
 * (5) The callback, or the confirmed stop, unmaps and frees an abandoned
 *     destination. The batch has a user for each descriptor until then.
 *
 * Never more than 8 MiB, of half of the batches that there are, are or can become
 * abandoned: no more is copied at once. When what has been abandoned leaves less than
 * 2 MiB, or none of these batches, the engine is switched off.
 *
 * If its driver goes, what has been abandoned and can not be stopped stays so, and
 * counted, for good. Callbacks that come then are those of a driver that cleans up.
 * See mm/migrate_copy_channels.c for how channels come and go.
 *
 * A batch's lock is held where its parts and copies change, with interrupts off.
 */
#include <linux/completion.h>
#include <linux/device.h>
#include <linux/dma-mapping.h>
#include <linux/dmaengine.h>
#include <linux/jiffies.h>
#include <linux/kobject.h>
#include <linux/kstrtox.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/sysfs.h>
#include <linux/vmstat.h>

#include "internal.h"
#include "migrate_copy.h"
#include "migrate_copy_dma.h"

/* Less is not worth another interrupt. */
#define PART		max(SZ_256K, PAGE_SIZE)
#define NR_PARTS	(COPY_BATCH_FOLIOS + 4 * COPY_CHANNELS)
#define MAX_AT_RISK	SZ_8M
/* Batches at a time, so many of which devices may keep. */
#define MAX_BATCHES	(NR_COPY_BATCHES / 2)
/* Parts that a channel has at a time. */
#define QUEUED		8
/* A batch has so many times what a device has to answer in, and the last of it. */
#define MAX_TIMEOUTS	10

/* What one descriptor copies. */
struct part {
	struct dma_batch *dma;
	struct copy *copy;
	struct copy_channel *channel;	/* NULL when it has ended */
};

/* What becomes of one folio of a batch. */
struct copy {
	struct folio *dst;
	struct device *dev;	/* NULL if it is not mapped */
	dma_addr_t to;
	dma_addr_t from;
	size_t size;
	unsigned int nr_parts;
	unsigned int pending;	/* of them */
	bool abandoned;
	int err;
	struct completion done;
};

struct dma_batch {
	struct copy_batch *batch;
	/* What parts and copies are up to. */
	spinlock_t lock;
	unsigned long deadline;		/* jiffies */
	unsigned long end;		/* nothing is begun any more */
	unsigned long at_risk;		/* bytes that have not been abandoned */
	struct copy_channel *channels[COPY_CHANNELS];
	unsigned int nr_channels;
	unsigned int nr_begun;		/* copies */
	unsigned int nr_parts;
	unsigned int nr_waiting;	/* parts of copies that are to be waited for */
	bool late;			/* something was not there in time */
	bool runs;			/* who migrates still has it */
	unsigned int nr_abandoned;	/* copies */
	struct copy copies[COPY_BATCH_FOLIOS];
	struct part parts[NR_PARTS];
};

static struct dma_batch *dma_batches[NR_COPY_BATCHES];
static atomic_long_t at_risk;
static atomic_long_t quarantined;
static atomic_t nr_pinned;	/* batches with abandoned copies */
static atomic_t nr_used;	/* batches with such, or that run */
static unsigned int timeout_ms = 100;

static void unmap_copy(const struct copy *copy)
{
	dma_unmap_page(copy->dev, copy->to, copy->size, DMA_FROM_DEVICE);
	dma_unmap_page(copy->dev, copy->from, copy->size, DMA_TO_DEVICE);
}

static int map_copy(struct copy *copy, struct device *dev, const struct copy_item *item)
{
	const size_t size = folio_size(item->src);

	if (size > dma_max_mapping_size(dev) || copy_should_fail(COPY_FAULT_MAP))
		return -EIO;
	copy->from = dma_map_page(dev, folio_page(item->src, 0), 0, size, DMA_TO_DEVICE);
	if (dma_mapping_error(dev, copy->from))
		return -EIO;
	copy->to = dma_map_page(dev, folio_page(item->dst, 0), 0, size, DMA_FROM_DEVICE);
	if (dma_mapping_error(dev, copy->to)) {
		dma_unmap_page(dev, copy->from, size, DMA_TO_DEVICE);
		return -EIO;
	}
	copy->dev = dev;
	copy->size = size;
	return 0;
}

static void release_abandoned(struct copy *copy)
{
	unmap_copy(copy);
	atomic_long_sub(copy->size, &quarantined);
	atomic_long_sub(copy->size, &at_risk);
	put_device(copy->dev);
	folio_put(copy->dst);
}

/* With the batch's lock. */
static void unpin(struct dma_batch *dma)
{
	atomic_dec(&nr_pinned);
	if (!dma->runs)
		atomic_dec(&nr_used);
}

/* @channel does not write for @part any more, if it has been its part. */
static void part_ended(struct part *part, const struct copy_channel *channel, int err)
{
	struct dma_batch *dma = part->dma;
	bool ended, release = false;
	struct copy *copy;

	scoped_guard(spinlock_irqsave, &dma->lock) {
		copy = part->copy;
		ended = channel && part->channel == channel;
		if (ended) {
			part->channel = NULL;
			copy->err = copy->err ?: err;
			if (!--copy->pending)
				release = copy->abandoned;
			if (release && !--dma->nr_abandoned)
				unpin(dma);
			if (!copy->pending && !release)
				complete(&copy->done);
		}
	}
	if (release)
		release_abandoned(copy);
	if (ended)
		copy_batch_put(dma->batch);
}

/* In whatever context the driver has. */
static void part_done(void *param, const struct dmaengine_result *result)
{
	struct part *part = param;
	const bool good = !result || result->result == DMA_TRANS_NOERROR;

	part_ended(part, part->channel, good ? 0 : -EIO);
}

static int submit_part(struct part *part, size_t offset, size_t size)
{
	struct dma_chan *chan = part->channel->chan;
	const struct copy *copy = part->copy;
	struct dma_async_tx_descriptor *tx;

	tx = dmaengine_prep_dma_memcpy(chan, copy->to + offset, copy->from + offset,
				       size, DMA_PREP_INTERRUPT | DMA_CTRL_ACK);
	if (!tx)
		return -ENOMEM;
	tx->callback_result = part_done;
	tx->callback_param = part;
	return dma_submit_error(dmaengine_submit(tx)) ? -EIO : 0;
}

static void begin_part(struct dma_batch *dma, struct copy *copy, struct copy_channel *channel,
		       size_t offset, size_t size)
{
	struct part *part = &dma->parts[dma->nr_parts++];

	scoped_guard(spinlock_irqsave, &dma->lock) {
		part->dma = dma;
		part->copy = copy;
		part->channel = channel;
	}
	refcount_inc(&dma->batch->users);
	if (submit_part(part, offset, size))
		part_ended(part, channel, -ENOMEM);
}

/* A folio is mapped for one device: its parts go to channels of that only. */
static unsigned int channels_of(const struct dma_batch *dma, const struct device *dev,
				unsigned int first, struct copy_channel **same)
{
	unsigned int i, nr = 0;

	for (i = 0; i < dma->nr_channels; i++) {
		struct copy_channel *channel = dma->channels[(first + i) % dma->nr_channels];

		if (dmaengine_get_dma_device(channel->chan) == dev)
			same[nr++] = channel;
	}
	return nr;
}

static void begin_parts(struct dma_batch *dma, struct copy *copy, unsigned int first)
{
	struct copy_channel *same[COPY_CHANNELS];
	const unsigned int nr = channels_of(dma, copy->dev, first, same);
	const size_t size = max(PAGE_ALIGN(DIV_ROUND_UP(copy->size, nr)), PART);
	size_t offset;
	unsigned int i;

	/* Callbacks come at any time: count all of them before the first one. */
	copy->nr_parts = DIV_ROUND_UP(copy->size, size);
	copy->pending = copy->nr_parts;
	for (i = 0, offset = 0; offset < copy->size; i++, offset += size)
		begin_part(dma, copy, same[i], offset, min(size, copy->size - offset));
}

static void begin_copy(struct dma_batch *dma, unsigned int i)
{
	const unsigned int first = i % dma->nr_channels;
	const struct copy_item *item = &dma->batch->items[i];
	struct copy *copy = &dma->copies[i];

	copy->dst = item->dst;
	copy->dev = NULL;
	copy->abandoned = false;
	copy->err = -ENOSPC;
	/* One that is not begun has its place all the same: others have not more each */
	copy->nr_parts = 1;
	reinit_completion(&copy->done);
	if (dma->late || dma->nr_parts + COPY_CHANNELS > NR_PARTS ||
	    time_after(jiffies, dma->end))
		return;
	copy->err = map_copy(copy, dmaengine_get_dma_device(dma->channels[first]->chan),
			     item);
	if (!copy->err)
		begin_parts(dma, copy, first);
}

static unsigned long timeout(void)
{
	return msecs_to_jiffies(READ_ONCE(timeout_ms)) + 1;
}

/* Devices have their time from when they last got something: others take theirs. */
static void issue(struct dma_batch *dma)
{
	unsigned int i;

	for (i = 0; i < dma->nr_channels; i++)
		dma_async_issue_pending(dma->channels[i]->chan);
	dma->deadline = jiffies + timeout();
}

static void begin_copies(struct dma_batch *dma)
{
	const unsigned int before = dma->nr_begun;

	while (dma->nr_begun < dma->batch->nr_items &&
	       dma->nr_waiting < QUEUED * dma->nr_channels) {
		begin_copy(dma, dma->nr_begun);
		dma->nr_waiting += dma->copies[dma->nr_begun++].nr_parts;
	}
	if (dma->nr_begun > before && !dma->late)
		issue(dma);
}

static unsigned int channels_wanted(const struct copy_batch *batch)
{
	const unsigned long parts = (batch->nr_pages << PAGE_SHIFT) / PART;

	return clamp(parts, 1, COPY_CHANNELS);
}

/* Is there room for another batch, and a channel that answers? */
static bool dma_usable(void)
{
	return atomic_long_read(&quarantined) <= MAX_AT_RISK - SZ_2M &&
	       atomic_read(&nr_pinned) < MAX_BATCHES && copy_channels_exist();
}

/* Room for @bytes among what a device that does not answer may keep. */
static bool may_risk(unsigned long bytes)
{
	if (atomic_long_add_return(bytes, &at_risk) <= MAX_AT_RISK)
		return true;
	atomic_long_sub(bytes, &at_risk);
	return false;
}

/* Others want to have some batches, too, if devices keep these. */
static bool may_use_batch(void)
{
	if (atomic_inc_return(&nr_used) <= MAX_BATCHES)
		return true;
	atomic_dec(&nr_used);
	return false;
}

/* A folio is mapped for one device: channels of others would be idle. */
static bool take_channels(struct dma_batch *dma, const struct copy_batch *batch)
{
	dma->nr_channels = copy_channels_take(dma->channels, channels_wanted(batch),
					      folio_nid(batch->items[0].dst),
					      batch->nr_items == 1);
	return dma->nr_channels;
}

static bool get_what_it_takes(struct dma_batch *dma, const struct copy_batch *batch,
			      unsigned long bytes)
{
	if (!may_risk(bytes))
		return false;
	if (may_use_batch()) {
		if (take_channels(dma, batch))
			return true;
		atomic_dec(&nr_used);
	}
	atomic_long_sub(bytes, &at_risk);
	return false;
}

static bool dma_start(struct copy_batch *batch)
{
	struct dma_batch *dma = dma_batches[batch->nr];
	const unsigned long bytes = batch->nr_pages << PAGE_SHIFT;

	if (!get_what_it_takes(dma, batch, bytes)) {
		count_vm_event(MIGRATE_COPY_REFUSED_BUSY);
		copy_engine_check(&copy_dma_engine);
		return false;
	}
	dma->batch = batch;
	dma->at_risk = bytes;
	dma->runs = true;
	dma->nr_begun = 0;
	dma->nr_parts = 0;
	dma->nr_waiting = 0;
	dma->late = false;
	dma->end = jiffies + MAX_TIMEOUTS * timeout();
	begin_copies(dma);
	return true;
}

/*
 * Devices that do not answer
 */

static struct part *next_part(const struct copy_channel *channel)
{
	unsigned int i, j;

	for (i = 0; i < NR_COPY_BATCHES; i++)
		for (j = 0; j < NR_PARTS; j++)
			if (READ_ONCE(dma_batches[i]->parts[j].channel) == channel)
				return &dma_batches[i]->parts[j];
	return NULL;
}

/* Can it be believed if it says that it has stopped? */
static bool can_be_stopped(const struct dma_device *device)
{
	return device->terminate_is_final && device->device_synchronize;
}

/* With CHANNEL_TAKEN. True if the device does not write for @channel any more. */
bool copy_channel_stop(struct copy_channel *channel)
{
	struct part *part = next_part(channel);

	if (!part)
		return true;
	if (!can_be_stopped(channel->chan->device) ||
	    dmaengine_terminate_sync(channel->chan))
		return false;
	for (; part; part = next_part(channel))
		part_ended(part, channel, -ETIMEDOUT);
	return true;
}

/* Those that @copy waits for are not used again: once may be too often. */
static void stop_channels(struct dma_batch *dma, const struct copy *copy)
{
	unsigned int i;

	for (i = 0; i < dma->nr_parts; i++) {
		struct part *part = &dma->parts[i];
		struct copy_channel *channel = READ_ONCE(part->channel);

		if (part->copy == copy && channel &&
		    !test_bit(CHANNEL_SICK, &channel->flags))
			copy_channel_is_sick(channel);
	}
}

/* Its parts are nobody's now, and never end. */
void copy_channel_is_lost(struct copy_channel *channel)
{
	struct part *part;

	while ((part = next_part(channel))) {
		guard(spinlock_irqsave)(&part->dma->lock);
		if (part->channel == channel)
			part->channel = NULL;
	}
}

/* False if it is complete after all. */
static bool abandon(struct dma_batch *dma, struct copy *copy)
{
	guard(spinlock_irqsave)(&dma->lock);
	if (!copy->pending)
		return false;
	folio_get(copy->dst);
	get_device(copy->dev);
	copy->abandoned = true;
	dma->at_risk -= copy->size;
	atomic_long_add(copy->size, &quarantined);
	if (!dma->nr_abandoned++)
		atomic_inc(&nr_pinned);
	return true;
}

static bool arrived(struct dma_batch *dma, struct copy *copy)
{
	const unsigned long now = jiffies;

	if (time_before(now, dma->deadline))
		return wait_for_completion_timeout(&copy->done, dma->deadline - now);
	/* Waiting for no time takes until the next tick. */
	return try_wait_for_completion(&copy->done);
}

/* Returns 0, -EBUSY if it has been abandoned, or why it can not be used. */
static int wait_for_copy(struct dma_batch *dma, struct copy *copy)
{
	if (!arrived(dma, copy)) {
		count_vm_event(MIGRATE_COPY_DMA_TIMEOUTS);
		dma->late = true;
		stop_channels(dma, copy);
		if (abandon(dma, copy)) {
			copy_engine_check(&copy_dma_engine);
			return -EBUSY;
		}
	}
	unmap_copy(copy);
	return copy->err;
}

static int dma_wait(struct copy_batch *batch, struct copy_item *item)
{
	struct dma_batch *dma = dma_batches[batch->nr];
	struct copy *copy = &dma->copies[item - batch->items];
	int err;

	err = copy->dev ? wait_for_copy(dma, copy) : copy->err;
	dma->nr_waiting -= copy->nr_parts;
	begin_copies(dma);
	return err;
}

static void dma_end(struct copy_batch *batch)
{
	struct dma_batch *dma = dma_batches[batch->nr];

	scoped_guard(spinlock_irqsave, &dma->lock) {
		dma->runs = false;
		if (!dma->nr_abandoned)
			atomic_dec(&nr_used);
	}
	atomic_long_sub(dma->at_risk, &at_risk);
	copy_channels_return(dma->channels, dma->nr_channels);
}

static int alloc_dma_batches(void)
{
	unsigned int i, j;

	for (i = 0; i < NR_COPY_BATCHES; i++) {
		struct dma_batch *dma;

		if (dma_batches[i])
			continue;
		dma = kvzalloc_obj(*dma);
		if (!dma)
			return -ENOMEM;
		spin_lock_init(&dma->lock);
		for (j = 0; j < COPY_BATCH_FOLIOS; j++)
			init_completion(&dma->copies[j].done);
		dma_batches[i] = dma;
	}
	return 0;
}

static int dma_enable(void)
{
	int err;

#ifdef __HAVE_ARCH_COPY_HIGHPAGE
	/* There is more to a page than its contents. */
	return -EOPNOTSUPP;
#endif
	err = alloc_dma_batches();
	if (err)
		return err;
	return copy_channels_open();
}

const struct copy_engine copy_dma_engine = {
	.name		= "dma",
	/* A CPU copies less while it waits for the interrupt. */
	.min_bytes	= SZ_256K,
	.folios_event	= MIGRATE_COPY_DMA,
	.pages_event	= MIGRATE_COPY_DMA_PAGES,
	.enable		= dma_enable,
	.disable	= copy_channels_close,
	.usable		= dma_usable,
	.start		= dma_start,
	.wait		= dma_wait,
	.end		= dma_end,
};

static ssize_t dma_timeout_ms_show(struct kobject *kobj, struct kobj_attribute *attr,
				   char *buf)
{
	return sysfs_emit(buf, "%u\n", READ_ONCE(timeout_ms));
}

static ssize_t dma_timeout_ms_store(struct kobject *kobj, struct kobj_attribute *attr,
				    const char *buf, size_t count)
{
	unsigned int ms;
	int err = kstrtouint(buf, 0, &ms);

	if (err)
		return err;
	if (ms < 1 || ms > 10000)
		return -EINVAL;
	WRITE_ONCE(timeout_ms, ms);
	return count;
}

struct kobj_attribute copy_dma_timeout_attr = __ATTR_RW(dma_timeout_ms);

static ssize_t dma_quarantined_show(struct kobject *kobj, struct kobj_attribute *attr,
				    char *buf)
{
	return sysfs_emit(buf, "%ld\n", atomic_long_read(&quarantined));
}

struct kobj_attribute copy_dma_quarantined_attr = __ATTR_RO(dma_quarantined);
