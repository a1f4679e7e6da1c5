// SPDX-License-Identifier: GPL-2.0
/*
 * Count migration entries, to know when none is left.
 *
 * remove_migration_ptes() has to ask each VMA that might map a folio. After
 * fork(), that is each VMA of a family of processes, though one entry may be all
 * there is: the others have copied the page, or unmapped it, long ago. With a
 * count, the walk stops when the last entry is gone.
 *
 * Invariant
 *
 * If a folio is locked, and the counts of all its pages have been read as zero,
 * each once, from the first page to the last, then no migration entry refers to
 * the folio, and none will before the lock is released.
 *
 * Why it holds
 *
 * (1) Entries are counted and uncounted under the page table lock that protects
 *     them: counted before that lock is dropped by whoever made them, uncounted
 *     after they are gone. So an entry that can be found under its lock is
 *     counted. (Those of a page table that nobody can find yet are counted before
 *     the table can be found.)
 * (2) A new entry for a page is made
 *     a. of a mapping of the page, by the holder of the folio lock: that is the
 *        reader himself;
 *     b. as a copy of another entry, by fork(), which holds the lock of that one
 *        until the copy is counted;
 *     c. of a PMD's entry that is split, under the lock of that one.
 *     b and c need an entry to start with. So a page that has none gets none,
 *     and zero stays zero.
 * (3) For a single page this needs no memory barrier: fork() counts the copy
 *     before it drops the lock under which the original is removed later, so the
 *     one variable never passes through zero. But pages are read one after the
 *     other, and c moves a count from page to page: the PMD's entry counts at the
 *     first page, the PTEs' at their own. All of the latter are added before the
 *     former is dropped, with release semantics. Whoever drops the last count of
 *     the first page later, be it another CPU, does so by a read-modify-write of
 *     the same variable, which carries the release on. The reader begins with
 *     the first page and reads with acquire semantics: if that is zero, he sees
 *     what was added to the others. See
 *     Documentation/litmus-tests/mm/migration-entry-split.litmus.
 *
 * In what order VMAs are walked does not matter, nor does the rmap lock:
 *
 * - fork() copies entries (2b); children made later copy what is there later.
 * - munmap(), exit, the OOM reaper, MADV_DONTNEED and truncation zap entries,
 *   without the folio lock (1): the walk stops earlier, or is not begun. Then
 *   nobody waits for their page table lock any more, so the folio may be gone
 *   when it is dropped: they do not touch it after they have uncounted its entry.
 * - mremap() and khugepaged move entries or whole page tables, mprotect(),
 *   clear_refs and userfaultfd change them in place: neutral. What the walk finds
 *   of an entry that moves is no matter of the count: as long as it exists, it
 *   counts, and the walk goes on.
 * - A PMD is split (2c), by mprotect() or munmap() of a part of it, say, without
 *   the folio lock.
 * - A folio is split under its lock, while all its mappings are entries. That
 *   changes no entry, and counts go by page, so it changes no count.
 * - GUP and faults wait for an entry to go; reclaim and a second migration want
 *   the folio lock first.
 * - Memory that is taken offline is migrated first: no count is left behind.
 *
 * The store
 *
 * A fixed table, because entries are made where nothing can be allocated, and
 * because neither struct page nor struct folio has room. The last bits of a page's
 * number say which slot it has. So the pages of a folio have slots of their own,
 * side by side, and so do those of a stretch of memory up to 1/16 of all. Pages
 * further apart may share one. A slot holds the sum of counts that are not
 * negative, so zero means zero for each of them; if it is not zero, the walk goes
 * on, needlessly at worst. A slot that is full, at INT_MAX, becomes negative, which
 * is not zero either.
 *
 * Counting begins before the first migration, or never. Whether the count is
 * trusted can be changed at any time. A slot that drops below zero shows that an
 * entry was not counted: from then on no count is trusted.
 */
#define pr_fmt(fmt) "migration_entry_count: " fmt

#include <linux/cache.h>
#include <linux/init.h>
#include <linux/kobject.h>
#include <linux/kstrtox.h>
#include <linux/log2.h>
#include <linux/migrate_entry_count.h>
#include <linux/mm.h>
#include <linux/sysfs.h>
#include <linux/unroll.h>
#include <linux/vmstat.h>

#include <trace/events/migrate.h>

DEFINE_STATIC_KEY_FALSE_RO(migration_entry_counting);
struct migration_entry_table migration_entry_table __ro_after_init;

static bool counting __ro_after_init = IS_ENABLED(CONFIG_MIGRATION_ENTRY_COUNT_DEFAULT_ON);
static bool trusted __read_mostly = true;
static int broken;		/* xchg() wants a word */

/* A slot for 16 pages; 16 KiB at least, 16 MiB at most. A folio has to fit in. */
static unsigned int table_order(unsigned long nr_pages)
{
	return clamp(ilog2(nr_pages) - 4, max(12, MAX_PAGE_ORDER), 22);
}

static bool table_alloc(struct migration_entry_table *t, unsigned int order)
{
	t->mask = (1UL << order) - 1;
	t->slots = kvcalloc(1UL << order, sizeof(*t->slots), GFP_KERNEL);
	return t->slots;
}

/* Some entry was not counted. It will not be missed again. */
void __migration_entry_underflow(unsigned long pfn)
{
	if (xchg(&broken, 1))
		return;
	WRITE_ONCE(trusted, false);
	pr_err("an entry was not counted, as seen at page %#lx: migration walks all VMAs from now on\n",
	       pfn);
	WARN_ON_ONCE(IS_ENABLED(CONFIG_DEBUG_VM));
}

/* Whether 15 pages after one that has no entry have none. */
static bool rest_is_empty(const atomic_t *slot)
{
	int i, any = 0;

	unrolled_full
	for (i = 1; i < 16; i++)
		any |= atomic_read(slot + i);
	if (any)
		return false;
	/* One for all of them: who gave up the last entry has done so before. */
	smp_acquire__after_ctrl_dep();
	return true;
}

/* The first of the pages up to @end that may have an entry, or @end. */
static noinline unsigned long first_left(const struct migration_entry_table *t,
					 unsigned long pfn, unsigned long end)
{
	while (pfn < end) {
		const atomic_t *slot = migration_entry_slot(t, pfn);

		/* Acquire: see (3). No PMD begins at one of the 15 that follow. */
		if (atomic_read_acquire(slot))
			break;
		pfn += IS_ALIGNED(pfn, 16) && end - pfn >= 16 && rest_is_empty(slot) ? 16 : 1;
	}
	return pfn;
}

static void trace_walk(const struct migration_entry_cursor *cursor)
{
	trace_migration_entry_walk(cursor->end - cursor->nr_pages, cursor->nr_pages,
				   cursor->nr_vmas, cursor->pfn == cursor->end);
}

static noinline bool trace_none_left(const struct migration_entry_cursor *cursor)
{
	trace_walk(cursor);
	migration_entry_debug_none(cursor->end - cursor->nr_pages, cursor->nr_pages,
				   "has entries, though its count is zero");
	/* A debug kernel goes on, to see that there are none indeed. */
	return migration_entry_debug_walk_on();
}

/* What there is to do for each folio is to be little: tracing is out of line. */
static __always_inline bool none_left(const struct migration_entry_cursor *cursor,
				      bool walked)
{
	if (walked) {
		count_vm_event(MIGRATION_ENTRY_WALK);
		count_vm_event(MIGRATION_ENTRY_WALK_STOPPED);
	} else {
		count_vm_event(MIGRATION_ENTRY_WALK_SKIPPED);
	}
	if (IS_ENABLED(CONFIG_MIGRATION_ENTRY_COUNT_DEBUG) ||
	    trace_migration_entry_walk_enabled())
		return trace_none_left(cursor);
	return false;
}

static noinline bool large_entries_left(struct migration_entry_cursor *cursor)
{
	cursor->pfn = first_left(&migration_entry_table, cursor->pfn, cursor->end);
	cursor->slot = migration_entry_slot(&migration_entry_table, cursor->pfn);
	return cursor->pfn < cursor->end;
}

/* The first page that @cursor has is known to have no entry. */
static __always_inline bool entries_left(struct migration_entry_cursor *cursor, bool walked)
{
	if (!READ_ONCE(trusted))
		return true;
	if (IS_ENABLED(CONFIG_MIGRATION_ENTRY_COUNT_DEBUG) && cursor->pfn == cursor->end)
		return true;
	if (likely(cursor->pfn + 1 == cursor->end))
		cursor->pfn++;
	else if (large_entries_left(cursor))
		return true;
	return none_left(cursor, walked);
}

bool __migration_entries_left(struct migration_entry_cursor *cursor)
{
	return entries_left(cursor, true);
}

/* The same, when nobody has been asked. */
bool __migration_entry_walk_begin(struct migration_entry_cursor *cursor)
{
	return entries_left(cursor, false);
}

/* @cursor has not come to the end of its pages, but the walk has ended. */
void __migration_entry_walk_end(const struct migration_entry_cursor *cursor)
{
	trace_walk(cursor);
	count_vm_event(MIGRATION_ENTRY_WALK);
	count_vm_event(MIGRATION_ENTRY_WALK_FULL);
}

static int __init set_counting(char *str)
{
	return kstrtobool(str, &counting);
}
early_param("migration_entry_count", set_counting);

#ifdef CONFIG_MIGRATION_ENTRY_COUNT_DEBUG
bool __init migration_entry_count_wanted(void)
{
	return counting;
}
#endif

static int __init migration_entry_count_init(void)
{
	const unsigned int order = table_order(totalram_pages());

	if (!counting)
		return 0;
	counting = table_alloc(&migration_entry_table, order);
	if (!counting) {
		pr_warn("no memory for %lu slots: not counting\n", 1UL << order);
		return 0;
	}
	static_branch_enable(&migration_entry_counting);
	return 0;
}

/* Before user space, and before the first file is read: nothing has migrated. */
core_initcall(migration_entry_count_init);

#ifdef CONFIG_SYSFS
static ssize_t counting_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%d\n", counting);
}

static struct kobj_attribute counting_attr = __ATTR_RO(counting);

static ssize_t trusted_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%d\n", counting && READ_ONCE(trusted));
}

static ssize_t trusted_store(struct kobject *kobj, struct kobj_attribute *attr,
			     const char *buf, size_t count)
{
	bool trust;
	int err = kstrtobool(buf, &trust);

	if (err)
		return err;
	if (trust && !counting)
		return -EOPNOTSUPP;
	if (trust && READ_ONCE(broken))
		return -EIO;
	WRITE_ONCE(trusted, trust);
	/* Whoever sets "broken" clears "trusted" then: one of us comes last. */
	smp_mb();
	if (trust && READ_ONCE(broken)) {
		WRITE_ONCE(trusted, false);
		return -EIO;
	}
	return count;
}

static struct kobj_attribute trusted_attr = __ATTR_RW(trusted);

static struct attribute *migration_entry_count_attrs[] = {
	&counting_attr.attr,
	&trusted_attr.attr,
	NULL,
};
ATTRIBUTE_GROUPS(migration_entry_count);

static int __init migration_entry_count_sysfs_init(void)
{
	struct kobject *kobj = kobject_create_and_add("migration_entry_count", mm_kobj);
	int err;

	if (!kobj)
		return -ENOMEM;
	err = sysfs_create_groups(kobj, migration_entry_count_groups);
	if (err)
		kobject_put(kobj);
	return err;
}
subsys_initcall(migration_entry_count_sysfs_init);
#endif

#include "tests/migrate_entry_count_kunit.h"
