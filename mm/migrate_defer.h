/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Holding the sources of folios that have been migrated until TLBs are flushed.
 * See mm/migrate_defer.c.
 */
#ifndef _MM_MIGRATE_DEFER_H
#define _MM_MIGRATE_DEFER_H

#include <linux/bits.h>
#include <linux/jump_label.h>
#include <linux/kconfig.h>
#include <linux/migrate_mode.h>
#include <linux/nodemask.h>
#include <linux/sched.h>
#include <linux/types.h>
#include <linux/vmstat.h>

struct folio;
struct list_head;
struct pglist_data;

/* Why sources are released, and TLBs flushed for them. */
enum migrate_defer_cause {
	MIGRATE_DEFER_CAP,	/* there would be too many */
	MIGRATE_DEFER_TIMER,
	MIGRATE_DEFER_KSWAPD,	/* it is to decide if the node has enough memory */
	MIGRATE_DEFER_ALLOC,	/* somebody would have to reclaim memory, or kill */
	MIGRATE_DEFER_WRITER,	/* a file is opened for writing */
	MIGRATE_DEFER_ISOLATE,	/* somebody needs particular pages */
	MIGRATE_DEFER_POISON,
	MIGRATE_DEFER_CPU,	/* a CPU goes offline */
	MIGRATE_DEFER_OFF,
	NR_MIGRATE_DEFER_CAUSES
};

/* What migrate_pages() notes about the source in ->migrate_info of a destination. */
enum {
	FOLIO_WAS_MAPPED = BIT(0),
	FOLIO_WAS_MLOCKED = BIT(1),
	FOLIO_FLUSH_DEFERRED = IS_ENABLED(CONFIG_MIGRATION_DEFER_FLUSH) ? BIT(2) : 0,
	FOLIO_OLD_STATES = FOLIO_WAS_MAPPED | FOLIO_WAS_MLOCKED | FOLIO_FLUSH_DEFERRED,
};

#ifdef CONFIG_MIGRATION_DEFER_FLUSH
DECLARE_STATIC_KEY_FALSE(migrate_defer_on);

bool __migrate_defer_flush(struct list_head *srcs, struct list_head *dsts,
			   enum migrate_reason reason);
void __migrate_defer_begin(void);
void __migrate_defer_source(struct folio *src, struct folio *dst);
void __migrate_defer_forget(struct folio *src);
bool __migrate_defer_drain(const nodemask_t *nodes, enum migrate_defer_cause cause);
bool __migrate_defer_drain_node(int nid, enum migrate_defer_cause cause);
bool __migrate_defer_pause(int nid);
void migrate_defer_resume(int nid);

#ifdef CONFIG_MIGRATION_DEFER_DEBUG
void migrate_defer_debug_hold(struct folio *src);
void migrate_defer_debug_release(struct folio *src);
void migrate_defer_debug_delay(void);
unsigned long migrate_defer_debug_cap(unsigned long nr_pages);
unsigned int migrate_defer_debug_deadline(unsigned int ms);
#else
static inline void migrate_defer_debug_hold(struct folio *src)
{
}

static inline void migrate_defer_debug_release(struct folio *src)
{
}

static inline void migrate_defer_debug_delay(void)
{
}

static inline unsigned long migrate_defer_debug_cap(unsigned long nr_pages)
{
	return nr_pages;
}

static inline unsigned int migrate_defer_debug_deadline(unsigned int ms)
{
	return ms;
}
#endif

/*
 * Migration begins. What the task has unmapped before is nothing that could be
 * deferred: it is flushed first. If this is off, nothing that the task unmaps is
 * deferred before the next migration, whenever it is switched on.
 */
static inline void migrate_defer_begin(void)
{
	if (static_branch_unlikely(&migrate_defer_on))
		__migrate_defer_begin();
	else
		current->tlb_ubc.deferrable = false;
}

/* Does the flush that is due for @srcs come later? Then their sources are held. */
static inline bool migrate_defer_flush(struct list_head *srcs, struct list_head *dsts,
				       enum migrate_reason reason)
{
	return static_branch_unlikely(&migrate_defer_on) &&
	       __migrate_defer_flush(srcs, dsts, reason);
}

/* Flushes TLBs and releases what is held. Returns true if that was anything. */
static inline bool migrate_defer_drain(enum migrate_defer_cause cause)
{
	return static_branch_unlikely(&migrate_defer_on) &&
	       __migrate_defer_drain(NULL, cause);
}

/* Only that of some nodes, or of all: NULL. */
static inline bool migrate_defer_drain_nodes(const nodemask_t *nodes,
					     enum migrate_defer_cause cause)
{
	return static_branch_unlikely(&migrate_defer_on) &&
	       __migrate_defer_drain(nodes, cause);
}

/* Pages of the node that are going to be free. */
static inline unsigned long migrate_defer_held(struct pglist_data *pgdat)
{
	return static_branch_unlikely(&migrate_defer_on) ?
	       node_page_state(pgdat, NR_MIGRATE_DEFERRED) : 0;
}

/* Nothing more is held of the node until migrate_defer_resume(), if this says so. */
static inline bool migrate_defer_pause(int nid)
{
	return static_branch_unlikely(&migrate_defer_on) && __migrate_defer_pause(nid);
}

static inline bool migrate_defer_drain_node(int nid, enum migrate_defer_cause cause)
{
	return static_branch_unlikely(&migrate_defer_on) &&
	       __migrate_defer_drain_node(nid, cause);
}
#else
static inline void migrate_defer_begin(void)
{
}

static inline bool migrate_defer_flush(struct list_head *srcs, struct list_head *dsts,
				       enum migrate_reason reason)
{
	return false;
}

static inline void __migrate_defer_source(struct folio *src, struct folio *dst)
{
}

static inline void __migrate_defer_forget(struct folio *src)
{
}

static inline bool migrate_defer_drain(enum migrate_defer_cause cause)
{
	return false;
}

static inline bool migrate_defer_drain_nodes(const nodemask_t *nodes,
					     enum migrate_defer_cause cause)
{
	return false;
}

static inline unsigned long migrate_defer_held(struct pglist_data *pgdat)
{
	return 0;
}

static inline bool migrate_defer_drain_node(int nid, enum migrate_defer_cause cause)
{
	return false;
}

static inline bool migrate_defer_pause(int nid)
{
	return false;
}

static inline void migrate_defer_resume(int nid)
{
}
#endif

#endif /* _MM_MIGRATE_DEFER_H */
