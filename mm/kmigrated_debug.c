// SPDX-License-Identifier: GPL-2.0
/*
 * Checks and tests of mm/kmigrated.c. In /sys/kernel/debug/kmigrated/:
 *
 * paused	Hints are queued, but not looked at, until this is 0 again.
 * flight_ms	How long to wait between the isolation of a batch and its migration:
 *		whatever may happen meanwhile does, and who must wait for the batch
 *		can be seen to.
 */
#define pr_fmt(fmt) "kmigrated: " fmt

#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/init.h>
#include <linux/mm.h>
#include <linux/vmstat.h>

#include "kmigrated.h"

static bool paused;
static u32 flight_ms;

bool kmigrated_debug_paused(void)
{
	return READ_ONCE(paused);
}

void kmigrated_debug_flight(void)
{
	const u32 ms = READ_ONCE(flight_ms);

	if (ms)
		msleep(ms);
}

/* Each hint has been counted twice; there are none now. */
void kmigrated_debug_stopped(void)
{
	unsigned long events[NR_VM_EVENT_ITEMS], done = 0;
	int i;

	all_vm_events(events);
	for (i = NUMA_ASYNC_MIGRATED; i <= NUMA_ASYNC_NOT_ISOLATED; i++)
		done += events[i];
	WARN(done != events[NUMA_ASYNC_QUEUED], "%lu hints queued, %lu done with\n",
	     events[NUMA_ASYNC_QUEUED], done);
}

static int paused_get(void *data, u64 *value)
{
	*value = READ_ONCE(paused);
	return 0;
}

static int paused_set(void *data, u64 value)
{
	WRITE_ONCE(paused, value);
	kmigrated_debug_changed();
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(paused_fops, paused_get, paused_set, "%llu\n");

static int __init kmigrated_debug_init(void)
{
	struct dentry *dir = debugfs_create_dir("kmigrated", NULL);

	debugfs_create_file_unsafe("paused", 0600, dir, NULL, &paused_fops);
	debugfs_create_u32("flight_ms", 0600, dir, &flight_ms);
	return 0;
}
late_initcall(kmigrated_debug_init);
