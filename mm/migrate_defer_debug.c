// SPDX-License-Identifier: GPL-2.0
/*
 * Checks and tests of mm/migrate_defer.c. In /sys/kernel/debug/migrate_defer/:
 *
 * overwrite	Sources that are held get other contents (0x5a in each byte), so
 *		that who reads them through an old translation can be seen.
 * cap_pages	What may be held of a node, in pages, instead of cap_kb.
 * deadline_ms	How long it may be held, instead of 10.
 * delay_us	How long to wait, up to twice that and by chance, where a writer
 *		and migration look for each other, and while pages are unmapped.
 *
 * A checksum of each source that is held is in its ->private, which is nobody
 * else's any more.
 */
#define pr_fmt(fmt) "migrate_defer: " fmt

#include <linux/crc32.h>
#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/init.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/random.h>

#include "internal.h"
#include "migrate_defer.h"

#define OVERWRITTEN	0x5a

static bool overwrite;
static u32 cap_pages, deadline_ms, delay_us;

static u32 checksum(struct folio *folio)
{
	u32 sum = 0;
	unsigned long i;

	for (i = 0; i < folio_nr_pages(folio); i++) {
		const void *page = kmap_local_folio(folio, i * PAGE_SIZE);

		sum = crc32_le(sum, page, PAGE_SIZE);
		kunmap_local(page);
	}
	return sum;
}

void migrate_defer_debug_hold(struct folio *src)
{
	unsigned long i;

	if (READ_ONCE(overwrite))
		for (i = 0; i < folio_nr_pages(src); i++)
			memset_page(folio_page(src, i), 0, OVERWRITTEN, PAGE_SIZE);
	src->private = (void *)(unsigned long)checksum(src);
}

void migrate_defer_debug_release(struct folio *src)
{
	WARN_ON_ONCE(src->private != (void *)(unsigned long)checksum(src));
	src->private = NULL;
}

void migrate_defer_debug_delay(void)
{
	const u32 us = READ_ONCE(delay_us);

	if (us)
		udelay(get_random_u32_below(2 * us));
}

unsigned long migrate_defer_debug_cap(unsigned long nr_pages)
{
	return READ_ONCE(cap_pages) ?: nr_pages;
}

unsigned int migrate_defer_debug_deadline(unsigned int ms)
{
	return READ_ONCE(deadline_ms) ?: ms;
}

/*
 * Somebody writes to a folio of a file: see (2) in mm/migrate_defer.c. Not to one
 * that was pinned when its file was still open, as that is not migrated; nor to
 * what is behind the end of a file, as fs-verity does, which is not mapped.
 */
void migrate_defer_check_writer(struct folio *folio)
{
	struct address_space *mapping = folio->mapping;

	if (!mapping || folio_test_anon(folio) || !mapping_tlb_deferred(mapping))
		return;
	WARN_ON_ONCE(!inode_is_open_for_write(mapping->host) &&
		     !folio_maybe_dma_pinned(folio) &&
		     folio_pos(folio) < i_size_read(mapping->host));
}

static int __init migrate_defer_debug_init(void)
{
	struct dentry *dir = debugfs_create_dir("migrate_defer", NULL);

	debugfs_create_bool("overwrite", 0600, dir, &overwrite);
	debugfs_create_u32("cap_pages", 0600, dir, &cap_pages);
	debugfs_create_u32("deadline_ms", 0600, dir, &deadline_ms);
	debugfs_create_u32("delay_us", 0600, dir, &delay_us);
	return 0;
}
late_initcall(migrate_defer_debug_init);
