// SPDX-License-Identifier: GPL-2.0
/*
 * Let copies of folios that are migrated fail.
 *
 * /sys/kernel/debug/fail_migrate_copy/ has a directory for each way to fail, with
 * the files that Documentation/fault-injection/fault-injection.rst describes:
 *
 * folio	an engine says that it could not copy a folio
 * helper	a helper can not be queued
 * batch	there is no memory for a batch
 * poison	the CPU meets an uncorrectable error in a page that it reads
 * map		a folio can not be mapped for a device
 * again	a folio that has been copied can not be moved now
 *
 * Nothing is poisoned in fact: memory_failure_queue() is not called for such a page.
 */
#include <linux/debugfs.h>
#include <linux/err.h>
#include <linux/fault-inject.h>
#include <linux/init.h>

#include "migrate_copy.h"

static struct fault_attr faults[] = {
	[COPY_FAULT_FOLIO]	= FAULT_ATTR_INITIALIZER,
	[COPY_FAULT_HELPER]	= FAULT_ATTR_INITIALIZER,
	[COPY_FAULT_BATCH]	= FAULT_ATTR_INITIALIZER,
	[COPY_FAULT_POISON]	= FAULT_ATTR_INITIALIZER,
	[COPY_FAULT_MAP]	= FAULT_ATTR_INITIALIZER,
	[COPY_FAULT_AGAIN]	= FAULT_ATTR_INITIALIZER,
};

static const char * const fault_names[] = {
	[COPY_FAULT_FOLIO]	= "folio",
	[COPY_FAULT_HELPER]	= "helper",
	[COPY_FAULT_BATCH]	= "batch",
	[COPY_FAULT_POISON]	= "poison",
	[COPY_FAULT_MAP]	= "map",
	[COPY_FAULT_AGAIN]	= "again",
};

/* Each call counts: "the third folio" is the third time somebody asks. */
bool copy_should_fail(enum copy_fault fault)
{
	return should_fail(&faults[fault], 1);
}

/* How many of @nr pages can be read. */
unsigned int copy_pages_until_poison(unsigned int nr)
{
	unsigned int i = 0;

	while (i < nr && !copy_should_fail(COPY_FAULT_POISON))
		i++;
	return i;
}

static int __init migrate_copy_faults_init(void)
{
	struct dentry *dir = debugfs_create_dir("fail_migrate_copy", NULL);
	int i;

	for (i = 0; i < ARRAY_SIZE(faults); i++)
		fault_create_debugfs_attr(fault_names[i], dir, &faults[i]);
	return 0;
}
late_initcall(migrate_copy_faults_init);
