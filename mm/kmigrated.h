/* SPDX-License-Identifier: GPL-2.0 */
/*
 * NUMA balancing that migrates in the background. See mm/kmigrated.c.
 */
#ifndef _MM_KMIGRATED_H
#define _MM_KMIGRATED_H

#include <linux/jump_label.h>
#include <linux/types.h>

struct folio;
struct mm_struct;
struct vm_fault;

#ifdef CONFIG_NUMA_BALANCING_ASYNC
DECLARE_STATIC_KEY_FALSE(kmigrated_on);

bool __migrate_misplaced_folio_later(struct folio *folio, struct vm_fault *vmf,
				     int node, int *flags);
void __kmigrated_void(struct mm_struct *mm, unsigned long start, unsigned long end);

/*
 * Has the folio been queued, so that somebody else migrates it? To be called with
 * the PTL held, before migrate_misplaced_folio_prepare().
 */
static inline bool migrate_misplaced_folio_later(struct folio *folio, struct vm_fault *vmf,
						 int node, int *flags)
{
	return static_branch_unlikely(&kmigrated_on) &&
	       __migrate_misplaced_folio_later(folio, vmf, node, flags);
}

static inline bool kmigrated_is_on(void)
{
	return static_branch_unlikely(&kmigrated_on);
}

/*
 * What has been queued for memory of @mm is not migrated any more when this returns.
 * The caller has seen to it that no more is queued for what it changes: with the VMAs
 * locked, or because what it has changed is looked at first. mmap_lock is held.
 */
static inline void kmigrated_void(struct mm_struct *mm, unsigned long start, unsigned long end)
{
	if (static_branch_unlikely(&kmigrated_on))
		__kmigrated_void(mm, start, end);
}
#else
static inline bool migrate_misplaced_folio_later(struct folio *folio, struct vm_fault *vmf,
						 int node, int *flags)
{
	return false;
}

static inline bool kmigrated_is_on(void)
{
	return false;
}

static inline void kmigrated_void(struct mm_struct *mm, unsigned long start, unsigned long end)
{
}
#endif

#ifdef CONFIG_NUMA_BALANCING_ASYNC_DEBUG
bool kmigrated_debug_paused(void);
void kmigrated_debug_flight(void);
void kmigrated_debug_stopped(void);
void kmigrated_debug_changed(void);
#else
static inline bool kmigrated_debug_paused(void)
{
	return false;
}

static inline void kmigrated_debug_flight(void)
{
}

static inline void kmigrated_debug_stopped(void)
{
}
#endif

#endif /* _MM_KMIGRATED_H */
