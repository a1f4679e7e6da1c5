/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Copying folios that are migrated: one in one go, or a batch by several CPUs
 * or a DMA engine. See mm/migrate_copy.c.
 */
#ifndef _MM_MIGRATE_COPY_H
#define _MM_MIGRATE_COPY_H

#include <linux/atomic.h>
#include <linux/highmem.h>
#include <linux/jump_label.h>
#include <linux/ktime.h>
#include <linux/migrate_mode.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/refcount.h>
#include <linux/sizes.h>
#include <linux/vmstat.h>
#include <linux/workqueue.h>

struct folio;
struct list_head;
struct copy_batch;

#ifdef CONFIG_MIGRATION_BATCH_COPY_DEBUG
void copy_check(struct folio *dst, struct folio *src);
#else
static inline void copy_check(struct folio *dst, struct folio *src)
{
}
#endif

enum copy_fault {
	COPY_FAULT_FOLIO,
	COPY_FAULT_HELPER,
	COPY_FAULT_BATCH,
	COPY_FAULT_POISON,
	COPY_FAULT_MAP,
	COPY_FAULT_AGAIN,
};

#ifdef CONFIG_MIGRATION_BATCH_COPY_FAULTS
bool copy_should_fail(enum copy_fault fault);
unsigned int copy_pages_until_poison(unsigned int nr);
#else
static inline bool copy_should_fail(enum copy_fault fault)
{
	return false;
}

static inline unsigned int copy_pages_until_poison(unsigned int nr)
{
	return nr;
}
#endif

/* copy_mc_highpages() for folios that are migrated. */
static inline unsigned long copy_migrated_pages(struct page *to, struct page *from,
						unsigned int nr)
{
	const unsigned int good = copy_pages_until_poison(nr);
	unsigned long ret = 0;

	if (good)
		ret = copy_mc_highpages(to, from, good);
	return ret + (nr - good) * PAGE_SIZE;
}

#ifdef CONFIG_MIGRATION_BATCH_COPY
DECLARE_STATIC_KEY_TRUE(folio_copy_bulk);
DECLARE_STATIC_KEY_FALSE(migrate_copy_engine_on);

struct copy_batch *__copy_batch_begin(struct list_head *srcs, struct list_head *dsts,
				      enum migrate_reason reason);
int __copy_batch_wait(struct copy_batch *batch, struct folio *dst, struct folio *src);
void __copy_batch_end(struct copy_batch *batch);

/* Two pages at once gain nothing, and lose some percent on Zen 5 if they are cold. */
#define FOLIO_COPY_BULK_MIN	SZ_16K

/* How many of @nr pages to copy before the next cond_resched(). */
static inline unsigned int folio_copy_unit(unsigned long nr)
{
	if (COPY_HIGHPAGES_AT_ONCE && nr >= FOLIO_COPY_BULK_MIN >> PAGE_SHIFT &&
	    static_branch_likely(&folio_copy_bulk))
		return min(nr, SZ_2M >> PAGE_SHIFT);
	return 1;
}

/* Begins to copy folios that are unmapped and flushed, or returns NULL. */
static inline struct copy_batch *copy_batch_begin(struct list_head *srcs,
						  struct list_head *dsts,
						  enum migrate_reason reason)
{
	if (!static_branch_unlikely(&migrate_copy_engine_on))
		return NULL;
	return __copy_batch_begin(srcs, dsts, reason);
}

/* Returns 1 if @dst has been filled, 0 if it has not, or an error. */
static inline int copy_batch_wait(struct copy_batch *batch, struct folio *dst,
				  struct folio *src)
{
	return batch ? __copy_batch_wait(batch, dst, src) : 0;
}

static inline void copy_batch_end(struct copy_batch *batch)
{
	if (batch)
		__copy_batch_end(batch);
}

/* A folio that has been copied could not be moved now: it will be copied again. */
static inline void copy_batch_wasted(void)
{
	count_vm_event(MIGRATE_COPY_WASTED);
}

/* Copies a folio when it is moved. */
static inline int copy_one_folio(struct folio *dst, struct folio *src)
{
	const unsigned long nr = folio_nr_pages(src);
	const int rc = folio_mc_copy(dst, src);

	if (!rc && folio_copy_unit(nr) > 1) {
		count_vm_event(MIGRATE_COPY_BULK);
		count_vm_events(MIGRATE_COPY_BULK_PAGES, nr);
	}
	return rc;
}
#else
static inline unsigned int folio_copy_unit(unsigned long nr)
{
	return 1;
}

static inline struct copy_batch *copy_batch_begin(struct list_head *srcs,
						  struct list_head *dsts,
						  enum migrate_reason reason)
{
	return NULL;
}

static inline int copy_batch_wait(struct copy_batch *batch, struct folio *dst,
				  struct folio *src)
{
	return 0;
}

static inline void copy_batch_end(struct copy_batch *batch)
{
}

static inline void copy_batch_wasted(void)
{
}

static inline int copy_one_folio(struct folio *dst, struct folio *src)
{
	return folio_mc_copy(dst, src);
}
#endif

#ifdef CONFIG_MIGRATION_BATCH_COPY
/*
 * For engines
 */

#define NR_COPY_BATCHES		8
/* Folios of a batch; what comes behind them is copied when it is moved. */
#define COPY_BATCH_FOLIOS	512
/* Helpers of a batch: CPUs do not copy faster than memory lets them. */
#define COPY_HELPERS_MAX	32

/* One folio. What is said about pages counts those of all folios of the batch. */
struct copy_item {
	struct folio *src;
	struct folio *dst;
	unsigned long first;	/* page */
	atomic_t left;		/* pages that are still to be copied */
	int err;		/* of one of them */
};

struct copy_helper {
	struct work_struct work;
	struct copy_batch *batch;
};

struct copy_batch {
	unsigned int nr;	/* among the batches there are */
	const struct copy_engine *engine;
	enum migrate_reason reason;
	refcount_t users;	/* who migrates, helpers that are queued, descriptors */
	unsigned int nr_items;
	unsigned int collected;	/* items that have been waited for */
	unsigned long nr_pages;
	ktime_t begin;
	ktime_t first;		/* when the first item was there */

	/* threads */
	atomic_long_t taken;	/* pages that someone copies or has copied */
	struct cgroup *cgroup;	/* whose time it is */
	int cpus[COPY_HELPERS_MAX + 1];
	unsigned int nr_cpus;
	unsigned int nr_helpers;
	struct copy_helper helpers[COPY_HELPERS_MAX];

	struct copy_item items[COPY_BATCH_FOLIOS];
};

struct copy_engine {
	const char *name;
	/* Batches of less are not worth the trouble. */
	unsigned long min_bytes;
	enum vm_event_item folios_event;
	enum vm_event_item pages_event;
	/* Gets ready, when it is switched on; may sleep. Optional. */
	int (*enable)(void);
	/* Another engine is used, or none; may sleep. Optional. */
	void (*disable)(void);
	/* Is there anything to be hoped from it? For copy_engine_check(). Optional. */
	bool (*usable)(void);
	/*
	 * Sees who could copy, of up to @nr_pages, before any folio is looked at.
	 * Returns false, with a count of why, if nobody. Optional.
	 */
	bool (*prepare)(struct copy_batch *batch, unsigned long nr_pages);
	/* Begins to copy, or returns false. */
	bool (*start)(struct copy_batch *batch);
	/*
	 * Returns when the copy of @item has come to an end: 0, -EHWPOISON if the
	 * source can not be read, -EBUSY if the destination can not be used any
	 * more, or any other error: @item is copied by who migrates it.
	 */
	int (*wait)(struct copy_batch *batch, struct copy_item *item);
	/* All items have been waited for. Optional. */
	void (*end)(struct copy_batch *batch);
};

extern const struct copy_engine copy_threads_engine;
extern const struct copy_engine copy_dma_engine;
extern struct kobj_attribute copy_max_helpers_attr;
extern struct kobj_attribute copy_dma_timeout_attr;
extern struct kobj_attribute copy_dma_quarantined_attr;

void copy_batch_put(struct copy_batch *batch);
void copy_engine_check(const struct copy_engine *e);
unsigned int copy_batch_find(const struct copy_batch *batch, unsigned long page);
#endif

#endif /* _MM_MIGRATE_COPY_H */
