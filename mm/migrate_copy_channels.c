// SPDX-License-Identifier: GPL-2.0
/*
 * The channels of DMA engines that copy folios.
 *
 * From switching on the engine "dma" to switching it off, channels of devices that
 * copy memory belong to it, and nobody else can use them. Each is used by one batch
 * at a time, which takes those that are free, and never waits for one.
 *
 * CHANNEL_TAKEN is a lock: who has it may use the channel, or give it back to its
 * driver. Before a driver is unbound, all channels of its device are taken, which
 * waits for the batches that have them, and given back. A channel is added with the
 * device locked, so that its driver either is bound and will tell when it goes, or
 * is found gone. Some drivers (idxd) take away channels one by one: those are given
 * back when their own device, in the class "dma", is deleted. A channel is asked for
 * and added with channels_mutex held, for which that has to wait.
 *
 * A channel whose device did not answer is sick until the engine is switched on or
 * off again, and by then all it was asked for has ended, or it has been stopped. It
 * is not used, and not given back to others, except when the driver goes.
 *
 * Locks: the device or its class, channels_mutex (which channels there are),
 * CHANNEL_TAKEN, and what dmaengine has of its own.
 */
#define pr_fmt(fmt) "migrate_copy: " fmt

#include <linux/device.h>
#include <linux/device/bus.h>
#include <linux/dmaengine.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/numa.h>
#include <linux/topology.h>
#include <linux/wait_bit.h>

#include "migrate_copy_dma.h"

static struct copy_channel channels[COPY_CHANNELS];
static DEFINE_MUTEX(channels_mutex);

static bool channel_trylock(struct copy_channel *channel)
{
	if (test_and_set_bit_lock(CHANNEL_TAKEN, &channel->flags))
		return false;
	if (channel->chan && !test_bit(CHANNEL_SICK, &channel->flags))
		return true;
	clear_and_wake_up_bit(CHANNEL_TAKEN, &channel->flags);
	return false;
}

static void channel_lock(struct copy_channel *channel)
{
	wait_on_bit_lock(&channel->flags, CHANNEL_TAKEN, TASK_UNINTERRUPTIBLE);
}

static void channel_unlock(struct copy_channel *channel)
{
	clear_and_wake_up_bit(CHANNEL_TAKEN, &channel->flags);
}

/* Who was added later may be nearer: @sorted has the nearest one first. */
static void sort_by_distance(struct copy_channel **sorted, int nid)
{
	int distances[COPY_CHANNELS];
	int i, j;

	for (i = 0; i < COPY_CHANNELS; i++) {
		const int node = READ_ONCE(channels[i].node);
		const int mine = node == NUMA_NO_NODE ? INT_MAX : node_distance(node, nid);

		for (j = i; j && distances[j - 1] > mine; j--) {
			distances[j] = distances[j - 1];
			sorted[j] = sorted[j - 1];
		}
		distances[j] = mine;
		sorted[j] = &channels[i];
	}
}

static struct device *device_of(const struct copy_channel *channel)
{
	return dmaengine_get_dma_device(channel->chan);
}

/*
 * Takes up to @want channels that nobody uses, those of devices near node @nid
 * first, all of one device if @same_device. Returns how many.
 */
unsigned int copy_channels_take(struct copy_channel **taken, unsigned int want, int nid,
				bool same_device)
{
	struct copy_channel *sorted[COPY_CHANNELS];
	unsigned int i, nr = 0;

	sort_by_distance(sorted, nid);
	for (i = 0; i < COPY_CHANNELS && nr < want; i++) {
		if (!channel_trylock(sorted[i]))
			continue;
		if (same_device && nr && device_of(sorted[i]) != device_of(taken[0]))
			channel_unlock(sorted[i]);
		else
			taken[nr++] = sorted[i];
	}
	return nr;
}

void copy_channels_return(struct copy_channel **taken, unsigned int nr)
{
	while (nr--)
		channel_unlock(taken[nr]);
}

/* Has anyone more to expect than to find them taken? */
bool copy_channels_exist(void)
{
	unsigned int i;

	for (i = 0; i < COPY_CHANNELS; i++)
		if (READ_ONCE(channels[i].chan) &&
		    !test_bit(CHANNEL_SICK, &channels[i].flags))
			return true;
	return false;
}

/* @channel, which the caller has taken, is not to be used any more. */
void copy_channel_is_sick(struct copy_channel *channel)
{
	pr_warn("%s does not answer, and is not used any more\n",
		dma_chan_name(channel->chan));
	set_bit(CHANNEL_SICK, &channel->flags);
	copy_channel_stop(channel);
}

/* With CHANNEL_TAKEN. */
static bool cure(struct copy_channel *channel)
{
	if (test_bit(CHANNEL_SICK, &channel->flags) && !copy_channel_stop(channel))
		return false;
	clear_bit(CHANNEL_SICK, &channel->flags);
	return true;
}

static void release_channel(struct copy_channel *channel)
{
	dma_release_channel(channel->chan);
	WRITE_ONCE(channel->chan, NULL);
	clear_bit(CHANNEL_SICK, &channel->flags);
}

/* Who has not stopped by now will not be asked again. */
static void channel_goes(struct copy_channel *channel)
{
	channel_lock(channel);
	if (!cure(channel)) {
		pr_err("%s can not be stopped: what it may write to stays allocated\n",
		       dma_chan_name(channel->chan));
		copy_channel_is_lost(channel);
	}
	release_channel(channel);
	channel_unlock(channel);
}

static int device_goes(struct notifier_block *nb, unsigned long action, void *data)
{
	unsigned int i;

	if (action != BUS_NOTIFY_UNBIND_DRIVER)
		return NOTIFY_DONE;
	guard(mutex)(&channels_mutex);
	for (i = 0; i < COPY_CHANNELS; i++)
		if (channels[i].chan && channels[i].chan->device->dev == data)
			channel_goes(&channels[i]);
	return NOTIFY_OK;
}

static void channel_deleted(struct device *dev)
{
	unsigned int i;

	guard(mutex)(&channels_mutex);
	for (i = 0; i < COPY_CHANNELS; i++)
		if (channels[i].chan && &channels[i].chan->dev->device == dev)
			channel_goes(&channels[i]);
}

/* As buses: from the first channel on, for good. */
static int watch_class(const struct class *class)
{
	static struct class_interface interface = { .remove_dev = channel_deleted };

	int err;

	if (interface.class)
		return 0;
	interface.class = class;
	err = class_interface_register(&interface);
	if (err)
		interface.class = NULL;
	return err;
}

/* Buses are watched from the first device on, for good. */
static int watch_bus(const struct bus_type *bus)
{
	static struct {
		const struct bus_type *bus;
		struct notifier_block nb;
	} watches[COPY_CHANNELS];
	unsigned int i;
	int err;

	for (i = 0; i < ARRAY_SIZE(watches); i++) {
		if (watches[i].bus == bus)
			return 0;
		if (watches[i].bus)
			continue;
		watches[i].nb.notifier_call = device_goes;
		err = bus_register_notifier(bus, &watches[i].nb);
		if (!err)
			watches[i].bus = bus;
		return err;
	}
	return -ENOSPC;
}

/* Devices that copy memory, and the class of all channels. */
struct copiers {
	struct device *devs[COPY_CHANNELS];
	unsigned int nr;
	const struct class *class;
};

/* A filter that wants none: its device is there as long as this is asked. */
static bool note_device(struct dma_chan *chan, void *param)
{
	struct device *dev = chan->device->dev;
	struct copiers *copiers = param;
	unsigned int i;

	copiers->class = chan->dev->device.class;
	for (i = 0; i < copiers->nr; i++)
		if (copiers->devs[i] == dev)
			return false;
	if (copiers->nr < COPY_CHANNELS)
		copiers->devs[copiers->nr++] = get_device(dev);
	return false;
}

static bool is_of(struct dma_chan *chan, void *dev)
{
	return chan->device->dev == dev;
}

static struct dma_chan *request_channel(dma_filter_fn filter, void *param)
{
	dma_cap_mask_t mask;

	dma_cap_zero(mask);
	dma_cap_set(DMA_MEMCPY, mask);
	return dma_request_channel(mask, filter, param);
}

static struct copy_channel *free_place(void)
{
	unsigned int i;

	for (i = 0; i < COPY_CHANNELS; i++)
		if (!channels[i].chan)
			return &channels[i];
	return NULL;
}

/* From the device's lock on, who unbinds its driver comes to device_goes(). */
static bool add_channel(struct device *dev)
{
	struct copy_channel *channel;
	struct dma_chan *chan;

	if (watch_bus(dev->bus))
		return false;
	guard(device)(dev);
	if (!device_is_bound(dev))
		return false;
	guard(mutex)(&channels_mutex);
	channel = free_place();
	chan = channel ? request_channel(is_of, dev) : NULL;
	if (!chan)
		return false;
	WRITE_ONCE(channel->node, dev_to_node(dev));
	WRITE_ONCE(channel->chan, chan);
	return true;
}

/* One of each device, then another one of each: those of all nodes have some. */
static void add_channels(struct copiers *copiers)
{
	unsigned int i, added;

	do {
		added = 0;
		for (i = 0; i < copiers->nr; i++)
			added += add_channel(copiers->devs[i]);
	} while (added);
}

/* Returns how many channels can be used. */
static unsigned int cure_channels(void)
{
	unsigned int i, nr = 0;

	guard(mutex)(&channels_mutex);
	for (i = 0; i < COPY_CHANNELS; i++) {
		channel_lock(&channels[i]);
		nr += channels[i].chan && cure(&channels[i]);
		channel_unlock(&channels[i]);
	}
	return nr;
}

/* Has as many channels as there are, up to 16. Returns 0, or -ENODEV. */
int copy_channels_open(void)
{
	struct copiers copiers = {};

	request_channel(note_device, &copiers);
	if (copiers.nr && !watch_class(copiers.class))
		add_channels(&copiers);
	while (copiers.nr)
		put_device(copiers.devs[--copiers.nr]);
	return cure_channels() ? 0 : -ENODEV;
}

/* Those that can not be stopped are kept: nobody else should have them. */
void copy_channels_close(void)
{
	unsigned int i;

	guard(mutex)(&channels_mutex);
	for (i = 0; i < COPY_CHANNELS; i++) {
		channel_lock(&channels[i]);
		if (channels[i].chan && cure(&channels[i]))
			release_channel(&channels[i]);
		channel_unlock(&channels[i]);
	}
}
