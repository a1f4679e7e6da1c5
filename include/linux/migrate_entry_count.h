/* SPDX-License-Identifier: GPL-2.0 */
/*
 * How many migration entries there are for a page.
 *
 * Called under the page table lock of the entry: before it is dropped when an
 * entry has been made or copied, and after the entry is gone when it has been
 * replaced or zapped. A PMD's entry, and one of a hugetlb folio, counts at the
 * first page. What moves an entry or changes it in place, and keeps its PFN,
 * does not count: mremap(), khugepaged putting a page table back, mprotect(),
 * fork() making the parent's entry read-only, clear_refs, userfaultfd.
 *
 * Do not touch the folio of an entry that has been uncounted, without a reference
 * of your own: who waits for the last entry to go may free it.
 */
#ifndef _LINUX_MIGRATE_ENTRY_COUNT_H
#define _LINUX_MIGRATE_ENTRY_COUNT_H

#include <linux/atomic.h>
#include <linux/jump_label.h>
#include <linux/types.h>

struct folio;
struct page;

#ifdef CONFIG_MIGRATION_ENTRY_COUNT_DEBUG
extern struct page_ext_operations migration_entry_count_ops;

bool migration_entry_count_wanted(void);
void migration_entry_debug_add(unsigned long pfn, unsigned int nr);
void migration_entry_debug_sub(unsigned long pfn, unsigned int nr);
void migration_entry_debug_none(unsigned long pfn, unsigned long nr, const char *when);
bool migration_entry_debug_walk_on(void);
void migration_entry_check_unlock(struct folio *folio);
void migration_entry_check_free(struct page *page, unsigned int order);
#else
static inline void migration_entry_debug_add(unsigned long pfn, unsigned int nr)
{
}

static inline void migration_entry_debug_sub(unsigned long pfn, unsigned int nr)
{
}

static inline void migration_entry_debug_none(unsigned long pfn, unsigned long nr,
					      const char *when)
{
}

static inline bool migration_entry_debug_walk_on(void)
{
	return false;
}

/* There are no migration entries for a folio that is unlocked ... */
static inline void migration_entry_check_unlock(struct folio *folio)
{
}

/* ... and for a page that is freed. */
static inline void migration_entry_check_free(struct page *page, unsigned int order)
{
}
#endif

/* How far the pages of a folio are known to have no entry. */
struct migration_entry_cursor {
	unsigned long pfn;	/* the first one that may have */
	unsigned long end;
	atomic_t *slot;		/* the count of that one, and of others */
	unsigned int nr_pages;
	unsigned int nr_vmas;	/* that were asked for entries */
};

#ifdef CONFIG_MIGRATION_ENTRY_COUNT
/* See mm/migrate_entry_count.c */
struct migration_entry_table {
	atomic_t *slots;
	unsigned long mask;
};

extern struct migration_entry_table migration_entry_table;
DECLARE_STATIC_KEY_FALSE(migration_entry_counting);

void __migration_entry_underflow(unsigned long pfn);
bool __migration_entries_left(struct migration_entry_cursor *cursor);
bool __migration_entry_walk_begin(struct migration_entry_cursor *cursor);
void __migration_entry_walk_end(const struct migration_entry_cursor *cursor);

static inline bool migration_entries_are_counted(void)
{
	return static_branch_unlikely(&migration_entry_counting);
}

/* The pages of a folio have their slots side by side. */
static inline atomic_t *migration_entry_slot(const struct migration_entry_table *t,
					     unsigned long pfn)
{
	return t->slots + (pfn & t->mask);
}

static inline void migration_entry_table_add(const struct migration_entry_table *t,
					     unsigned long pfn, unsigned int nr)
{
	atomic_t *slot = migration_entry_slot(t, pfn);

	do {
		atomic_inc(slot++);
	} while (--nr);
}

/* Returns false if there is an entry that had not been counted. */
static inline bool migration_entry_table_sub(const struct migration_entry_table *t,
					     unsigned long pfn, unsigned int nr)
{
	atomic_t *slot = migration_entry_slot(t, pfn);

	/* Release: see (3) in mm/migrate_entry_count.c */
	do {
		if (unlikely(atomic_add_negative_release(-1, slot++)))
			return false;
	} while (--nr);
	return true;
}

/**
 * migration_entry_add - count migration entries that have been made
 * @pfn:	the first page that one is for; the head page for one in a PMD
 * @nr:		how many, one for each page; 1 for one in a PMD or of hugetlb
 *
 * Context: under the page table lock of the entries, and that of those which
 * they are copied from.
 */
static inline void migration_entry_add(unsigned long pfn, unsigned int nr)
{
	if (!migration_entries_are_counted())
		return;
	migration_entry_table_add(&migration_entry_table, pfn, nr);
	migration_entry_debug_add(pfn, nr);
}

/**
 * migration_entry_sub - uncount migration entries that are gone
 * @pfn:	the first page that one was for; the head page for one in a PMD
 * @nr:		how many, one for each page; 1 for one in a PMD or of hugetlb
 *
 * Context: under the page table lock that the entries were under. If other
 * entries have taken their place, these have been counted before.
 */
static inline void migration_entry_sub(unsigned long pfn, unsigned int nr)
{
	if (!migration_entries_are_counted())
		return;
	migration_entry_debug_sub(pfn, nr);
	if (unlikely(!migration_entry_table_sub(&migration_entry_table, pfn, nr)))
		__migration_entry_underflow(pfn);
}

/**
 * migration_entries_left - whether a folio may still have migration entries
 * @cursor:	its pages, of which those without entries are taken off
 *
 * Context: under the folio lock, when another VMA has been asked.
 * Return: false if there is none, and none will be before the lock is released.
 */
static inline bool migration_entries_left(struct migration_entry_cursor *cursor)
{
	if (!migration_entries_are_counted())
		return true;
	cursor->nr_vmas++;
	/* Acquire: see (3) in mm/migrate_entry_count.c */
	return atomic_read_acquire(cursor->slot) || __migration_entries_left(cursor);
}

/**
 * migration_entry_walk_begin - whether a folio may have migration entries
 * @cursor:	for migration_entries_left()
 * @pfn:	its first page
 * @nr:		how many of its pages may have an entry; 1 if it is of hugetlb
 *
 * Context: under the folio lock.
 * Return: false if there is none, and none will be before the lock is released.
 */
static inline bool migration_entry_walk_begin(struct migration_entry_cursor *cursor,
					      unsigned long pfn, unsigned long nr)
{
	if (!migration_entries_are_counted())
		return true;
	cursor->pfn = pfn;
	cursor->end = pfn + nr;
	cursor->slot = migration_entry_slot(&migration_entry_table, pfn);
	cursor->nr_pages = nr;
	cursor->nr_vmas = 0;
	return atomic_read_acquire(cursor->slot) || __migration_entry_walk_begin(cursor);
}

/* Nobody is left to ask, if that was not ended by a count of zero. */
static inline void migration_entry_walk_end(const struct migration_entry_cursor *cursor)
{
	if (!migration_entries_are_counted())
		return;
	if (cursor->pfn != cursor->end)
		__migration_entry_walk_end(cursor);
	migration_entry_debug_none(cursor->end - cursor->nr_pages, cursor->nr_pages,
				   "has entries after all were replaced");
}
#else
static inline void migration_entry_add(unsigned long pfn, unsigned int nr)
{
}

static inline void migration_entry_sub(unsigned long pfn, unsigned int nr)
{
}

static inline bool migration_entries_left(struct migration_entry_cursor *cursor)
{
	return true;
}

static inline bool migration_entry_walk_begin(struct migration_entry_cursor *cursor,
					      unsigned long pfn, unsigned long nr)
{
	return true;
}

static inline void migration_entry_walk_end(const struct migration_entry_cursor *cursor)
{
}
#endif

#endif /* _LINUX_MIGRATE_ENTRY_COUNT_H */
