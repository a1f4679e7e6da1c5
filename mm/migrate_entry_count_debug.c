// SPDX-License-Identifier: GPL-2.0
/*
 * Count migration entries exactly, page by page, and find who does not count.
 *
 * The count that production kernels keep is a sum over pages that share a slot.
 * Here each page has its own, in its page_ext, fed by the same hooks, and what
 * ought to hold is asserted:
 *
 * - no count drops below zero. Walks do not stop at zero, unless told to: an
 *   entry that is found nevertheless makes it drop, and is reported;
 * - when the other count of a page is zero, so is this one;
 * - a walk has left no entries;
 * - a page that is freed has none, and neither has a folio that is unlocked.
 *
 * The exact count drops before the other one, and rises after it, so that it is
 * never seen above zero when the other one is zero.
 *
 * Device memory has no page_ext: its entries are in the total only.
 */
#include <linux/debugfs.h>
#include <linux/migrate_entry_count.h>
#include <linux/mm.h>
#include <linux/mmdebug.h>
#include <linux/page_ext.h>

/* All there are, and the most that one page had. */
static atomic_long_t nr_entries;
static atomic_t deepest;

/* Whether walks go on at zero. */
static bool walk_on = true;

/* Others follow from the first that is wrong. */
static atomic_t reported;

static bool __init needed(void)
{
	return migration_entry_count_wanted();
}

struct page_ext_operations migration_entry_count_ops = {
	.size = sizeof(atomic_t),
	.need = needed,
};

static atomic_t *count_of(struct page_ext *page_ext)
{
	return page_ext_data(page_ext, &migration_entry_count_ops);
}

static void note_depth(int depth)
{
	int old = atomic_read(&deepest);

	while (depth > old && !atomic_try_cmpxchg(&deepest, &old, depth))
		;
}

static void report(unsigned long pfn, const char *what)
{
	if (atomic_xchg(&reported, 1))
		return;
	dump_page(pfn_to_page(pfn), what);
	WARN(1, "migration entries: page %#lx %s", pfn, what);
}

void migration_entry_debug_add(unsigned long pfn, unsigned int nr)
{
	struct page_ext *page_ext;
	struct page_ext_iter iter;

	atomic_long_add(nr, &nr_entries);
	rcu_read_lock();
	for_each_page_ext(pfn_to_page(pfn), nr, page_ext, iter)
		note_depth(atomic_inc_return(count_of(page_ext)));
	rcu_read_unlock();
}

void migration_entry_debug_sub(unsigned long pfn, unsigned int nr)
{
	struct page_ext *page_ext;
	struct page_ext_iter iter;
	bool underflow = false;

	atomic_long_sub(nr, &nr_entries);
	rcu_read_lock();
	for_each_page_ext(pfn_to_page(pfn), nr, page_ext, iter)
		underflow |= atomic_dec_return(count_of(page_ext)) < 0;
	rcu_read_unlock();
	if (underflow)
		report(pfn, "has an entry that was not counted");
}

/* None of @nr pages may have an entry now. */
void migration_entry_debug_none(unsigned long pfn, unsigned long nr, const char *when)
{
	struct page_ext *page_ext;
	struct page_ext_iter iter;
	bool left = false;

	/* After what the walk has seen of page tables without their locks. */
	smp_rmb();
	rcu_read_lock();
	for_each_page_ext(pfn_to_page(pfn), nr, page_ext, iter)
		left |= atomic_read(count_of(page_ext)) != 0;
	rcu_read_unlock();
	if (left)
		report(pfn, when);
}

void migration_entry_check_unlock(struct folio *folio)
{
	if (migration_entries_are_counted())
		migration_entry_debug_none(folio_pfn(folio),
					   folio_test_hugetlb(folio) ? 1 : folio_nr_pages(folio),
					   "is unlocked with migration entries");
}

void migration_entry_check_free(struct page *page, unsigned int order)
{
	if (migration_entries_are_counted())
		migration_entry_debug_none(page_to_pfn(page), 1UL << order,
					   "is freed with migration entries");
}

bool migration_entry_debug_walk_on(void)
{
	return READ_ONCE(walk_on);
}

static int total_get(void *data, u64 *val)
{
	*val = atomic_long_read(&nr_entries);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(total_fops, total_get, NULL, "%lld\n");

static int __init migration_entry_debug_init(void)
{
	struct dentry *dir = debugfs_create_dir("migration_entry_count", NULL);

	debugfs_create_file("total", 0400, dir, NULL, &total_fops);
	debugfs_create_atomic_t("deepest", 0600, dir, &deepest);
	debugfs_create_bool("walk_on", 0600, dir, &walk_on);
	return 0;
}
late_initcall(migration_entry_debug_init);
