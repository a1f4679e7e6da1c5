// SPDX-License-Identifier: GPL-2.0
/*
 * Migrate folios without an IPI for each batch: hold the sources instead.
 *
 * migrate_pages() replaces the PTEs of a batch by migration entries, and then has
 * all CPUs that might still have the old ones in their TLBs flush these, before
 * it copies anything. Where nobody can write to a folio, a CPU that goes on using
 * the old translation reads the same bytes as everybody else, for as long as the
 * source is neither changed nor used for something else. So the source is held,
 * and flushing is put off: once for many batches, and not at all for CPUs that
 * have meanwhile done so for another reason.
 *
 * Invariants
 *
 * (1) A source that is held is not written to, and not released, before each CPU
 *     that may have a translation to it has flushed its TLB.
 *     That holds because the CPUs are added to those of the node before a source
 *     is held, and a drain takes sources and CPUs at once, then flushes, then
 *     releases: the CPUs of each source that is held are those that are yet to be
 *     flushed, or a flush of theirs began after it was unmapped.
 * (2) Nobody writes to the destination of a source that is held. It is in the page
 *     cache of a regular file that nobody has opened for writing, of a filesystem
 *     that changes cached pages up to its size only for those who have
 *     (FS_STABLE_CACHE).
 * (3) No more than cap_kb is held of a node, and not for longer than the deadline
 *     of 10 ms and what it takes to run a worker. If that is late, no more is
 *     held until it has been done.
 * (4) Whoever wants the memory gets it at once: see enum migrate_defer_cause.
 *
 * Who could make (2) false?
 *
 * - A writer: write(), a shared mapping, truncate(), fallocate(), direct I/O, and
 *   ioctls that exchange or share blocks all need the file to be open for writing,
 *   or get_write_access(). See "Writers" below.
 * - A store through a private mapping: is to a copy. wp_page_copy() clears the PTE
 *   and flushes that address on all CPUs before it makes the copy visible. So do
 *   ptrace, uprobes and all of FOLL_FORCE, as they have to break COW as well.
 * - A store that is already under way through a TLB that still allows it, behind
 *   a PTE that no longer does: a PTE that allows to write to the page cache is of
 *   a shared mapping that may be written to, whose file is open for writing; when
 *   it has been unmapped, its TLBs have been flushed.
 *   If a dirty PTE is found nevertheless, the batch is flushed as usual.
 * - DMA: needs a reference. Those that were there before make the move fail; for a
 *   new one that writes, a PTE has to be writable.
 *
 * And who would notice that TLBs have not been flushed?
 *
 * - munmap(), mremap(), mprotect(), MADV_DONTNEED, MAP_FIXED, truncation: change
 *   the PTE that the migration has restored, and flush that address. If they find
 *   the migration entry instead, which they would not flush: all of them call
 *   flush_tlb_batched_pending() first, with the page table locked, and what has
 *   been unmapped stays pending there until somebody has flushed the whole mm.
 *   mremap() of a page table flushes its range in any case. NUMA balancing goes
 *   by mprotect(): the flush it saves later is for what comes after it.
 * - Reclaim of the destination, or its migration: as any PTE, they unmap it, and
 *   flush, or defer it again: the bytes are still the same, in all three places.
 * - fork(): the child has no stale translations. exit() and exec() flush.
 * - A CPU that switches to another mm, or to none: looks at tlb_gen, which has been
 *   advanced when the PTE was cleared, before it uses the first one again. That is
 *   why the CPUs that are known when a folio is unmapped are all that matter.
 * - GUP and page table walkers: do not use TLBs. KVM, IOMMUs: their secondary TLBs
 *   are flushed when a folio is unmapped, as always; only IPIs are put off.
 * - CPU hotplug: a CPU comes up with no translations; one that goes needs no IPI.
 * - Split: needs the reference count of the source, which is not what it expects.
 *   Memory failure, and the isolation of pages (offlining, CMA, gigantic pages)
 *   would find one with a reference that is not on an LRU: they drain first.
 *   Compaction passes over it, as over any page that is being migrated.
 *
 * Writers
 *
 *	migration, destination locked		get_write_access()
 *	-----------------------------		------------------
 *	set AS_TLB_DEFERRED			increment i_writecount
 *	hold the source				(full barrier)
 *	full barrier				if AS_TLB_DEFERRED:
 *	if i_writecount > 0, or					drain
 *	   AS_TLB_DEFERRED is clear:			then clear it
 *		drain
 *	unlock the destination			lock the destination, write
 *
 * Either migration sees that there is a writer, or the writer what is held. The
 * flag outlives what is held: whoever opens the file for writing next finds
 * nothing to be drained. It must not be cleared before the drain, as a second
 * writer would not wait for it. A writer that clears it after it has been set
 * again, and has closed the file when i_writecount is looked at, has cleared it
 * before: that is why it is looked at once more, and in this order.
 *
 * Locks
 *
 * ->lock of a node is for what is held; ->drain is held while it is flushed and
 * released, so that nobody who drains returns before what somebody else has taken
 * has been released. A drain takes no other lock and no memory: it may be called
 * with folios locked, and by who reclaims.
 */
#define pr_fmt(fmt) "migrate_defer: " fmt

#include <linux/cpuhotplug.h>
#include <linux/fs.h>
#include <linux/init.h>
#include <linux/kobject.h>
#include <linux/ktime.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/pagemap.h>
#include <linux/folio_batch.h>
#include <linux/rmap.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/sysfs.h>
#include <linux/vmstat.h>
#include <linux/wait_bit.h>
#include <linux/workqueue.h>

#include <asm/tlbflush.h>

#include <trace/events/migrate.h>

#include "internal.h"
#include "migrate_defer.h"

#define DEADLINE_MS	10
/* A worker that has not come by then is late. */
#define LATE_MS		(2 * DEADLINE_MS)
/* Memory that is held is missing from where it was: it must not make kswapd run. */
#define MAX_KB_DEFAULT	8192
#define WMARK_SHARE	4

/* Who moves memory that is read. Others want the source, or need no flush. */
#define REASONS	(BIT(MR_DEMOTION) | BIT(MR_DAMON) | BIT(MR_SYSCALL) | \
		 BIT(MR_MEMPOLICY_MBIND))

struct defer_node {
	/* Protects what is held, and what has been promised. */
	spinlock_t lock;
	struct list_head folios;		/* sources that are held */
	unsigned long nr_held;			/* their pages, those being released too */
	unsigned long nr_promised;		/* pages unmapped, not held yet */
	struct arch_tlbflush_unmap_batch tlb;	/* CPUs that are yet to be flushed */
	u64 epoch;				/* of what they have to flush last */
	ktime_t oldest;				/* since when, or 0 */

	/* Held by who flushes and releases; others wait for that. */
	struct mutex drain;
	struct arch_tlbflush_unmap_batch flushing;	/* of who has ->drain */

	struct delayed_work deadline;
	int nid;
	struct kobject *kobj;

	/* Who reclaim memory of the node directly, and came when this was on. */
	atomic_t nr_reclaimers ____cacheline_aligned_in_smp;
};

DEFINE_STATIC_KEY_FALSE(migrate_defer_on);

static const char * const cause_names[] = {
	[MIGRATE_DEFER_CAP]	= "cap",
	[MIGRATE_DEFER_TIMER]	= "timer",
	[MIGRATE_DEFER_KSWAPD]	= "kswapd",
	[MIGRATE_DEFER_ALLOC]	= "alloc",
	[MIGRATE_DEFER_WRITER]	= "writer",
	[MIGRATE_DEFER_ISOLATE]	= "isolate",
	[MIGRATE_DEFER_POISON]	= "poison",
	[MIGRATE_DEFER_CPU]	= "cpu",
	[MIGRATE_DEFER_OFF]	= "off",
};

static struct defer_node *nodes[MAX_NUMNODES] __read_mostly;
static struct workqueue_struct *deadline_wq;
static bool enabled;
static unsigned int max_kb = MAX_KB_DEFAULT;
static DEFINE_MUTEX(switch_mutex);

/* --- how much ------------------------------------------------------------- */

/*
 * kswapd is woken at the low watermark and stops at the high one: a quarter of
 * what is in between can be missing without that making a difference.
 */
static unsigned long node_cap(int nid)
{
	unsigned long cap = READ_ONCE(max_kb) >> (PAGE_SHIFT - 10);
	unsigned long gap = 0;
	int i;

	if (!node_online(nid))
		return 0;
	for (i = 0; i < MAX_NR_ZONES; i++) {
		const struct zone *zone = &NODE_DATA(nid)->node_zones[i];

		if (populated_zone(zone))
			gap += zone->_watermark[WMARK_HIGH] - zone->_watermark[WMARK_LOW];
	}
	return migrate_defer_debug_cap(min(cap, gap / WMARK_SHARE));
}

/* --- release -------------------------------------------------------------- */

static void release_sources(struct list_head *folios)
{
	struct folio_batch fbatch;
	struct folio *folio, *next;

	folio_batch_init(&fbatch);
	list_for_each_entry_safe(folio, next, folios, lru) {
		list_del(&folio->lru);
		migrate_defer_debug_release(folio);
		if (!folio_batch_add(&fbatch, folio))
			folios_put(&fbatch);
	}
	if (fbatch.nr)
		folios_put(&fbatch);
}

/* What there is of sources and CPUs, at once: see (1). */
static unsigned long take(struct defer_node *node, struct list_head *folios,
			  ktime_t *oldest, u64 *epoch)
{
	struct folio *folio;
	unsigned long nr = 0;

	lockdep_assert_held(&node->drain);
	spin_lock(&node->lock);
	list_splice_init(&node->folios, folios);
	arch_tlbbatch_fold(&node->flushing, &node->tlb);
	*epoch = node->epoch;
	*oldest = node->oldest;
	node->oldest = 0;
	spin_unlock(&node->lock);
	list_for_each_entry(folio, folios, lru)
		nr += folio_nr_pages(folio);
	return nr;
}

static bool __drain_node(struct defer_node *node, enum migrate_defer_cause cause)
{
	LIST_HEAD(folios);
	unsigned long nr;
	unsigned int cpus;
	ktime_t oldest;
	u64 epoch, age;

	mutex_lock(&node->drain);
	nr = take(node, &folios, &oldest, &epoch);
	count_vm_events(MIGRATE_DEFER_CPUS_SYNCED, arch_tlbbatch_trim(&node->flushing, epoch));
	cpus = arch_tlbbatch_weight(&node->flushing);
	count_vm_events(MIGRATE_DEFER_CPUS_FLUSHED, cpus);
	arch_tlbbatch_flush(&node->flushing);
	age = oldest ? ktime_to_ns(ktime_sub(ktime_get(), oldest)) : 0;
	release_sources(&folios);
	spin_lock(&node->lock);
	node->nr_held -= nr;
	spin_unlock(&node->lock);
	mutex_unlock(&node->drain);

	if (!nr && !cpus)
		return false;
	mod_node_page_state(NODE_DATA(node->nid), NR_MIGRATE_DEFERRED, -(long)nr);
	count_vm_event(MIGRATE_DEFER_DRAIN_CAP + cause);
	trace_migrate_defer_drain(node->nid, cause_names[cause], nr, cpus, age);
	return nr;
}

static bool drain_node(struct defer_node *node, enum migrate_defer_cause cause)
{
	/* What is being released counts as held, so it is waited for. */
	return node && READ_ONCE(node->nr_held) && __drain_node(node, cause);
}

bool __migrate_defer_drain_node(int nid, enum migrate_defer_cause cause)
{
	return drain_node(nodes[nid], cause);
}

bool __migrate_defer_drain(const nodemask_t *mask, enum migrate_defer_cause cause)
{
	bool any = false;
	int nid;

	for_each_node(nid)
		if (!mask || node_isset(nid, *mask))
			any |= drain_node(nodes[nid], cause);
	return any;
}

static void deadline_work(struct work_struct *work)
{
	struct defer_node *node = container_of(to_delayed_work(work), struct defer_node,
					       deadline);

	__drain_node(node, MIGRATE_DEFER_TIMER);
}

static void start_deadline(struct defer_node *node)
{
	lockdep_assert_held(&node->lock);
	if (node->oldest)
		return;
	WRITE_ONCE(node->oldest, ktime_get());
	mod_delayed_work(deadline_wq, &node->deadline,
			 msecs_to_jiffies(migrate_defer_debug_deadline(DEADLINE_MS)));
}

/* --- what can be deferred --------------------------------------------------- */

/* Why nobody else may read a folio through old translations, or 0. It is locked. */
static int denial(struct folio *folio)
{
	struct address_space *mapping = folio_mapping(folio);
	struct inode *inode;

	if (folio_test_anon(folio))
		return folio_test_dirty(folio) ? MIGRATE_DEFER_DENIED_ANON_DIRTY :
						 MIGRATE_DEFER_DENIED_ANON;
	inode = mapping ? mapping->host : NULL;
	if (!inode || !S_ISREG(inode->i_mode) || inode->i_mapping != mapping ||
	    !(inode->i_sb->s_type->fs_flags & FS_STABLE_CACHE))
		return MIGRATE_DEFER_DENIED_FS;
	if (inode_is_open_for_write(inode) || mapping_writably_mapped(mapping))
		return MIGRATE_DEFER_DENIED_WRITER;
	if (!folio_test_uptodate(folio) || folio_test_dirty(folio) ||
	    folio_test_writeback(folio))
		return MIGRATE_DEFER_DENIED_DIRTY;
	return 0;
}

/* The pages that would be held, if all that have been mapped can be; or 0. */
static unsigned long deferrable_pages(struct list_head *srcs, struct list_head *dsts)
{
	struct folio *src, *dst = list_first_entry(dsts, struct folio, lru);
	const int nid = folio_nid(list_first_entry(srcs, struct folio, lru));
	unsigned long nr = 0;
	bool all = true;

	list_for_each_entry(src, srcs, lru) {
		const unsigned long nr_src = folio_nr_pages(src);
		int event = 0;

		if (dst->migrate_info & FOLIO_WAS_MAPPED) {
			event = folio_nid(src) == nid ? denial(src) :
							MIGRATE_DEFER_DENIED_MIXED;
			nr += nr_src;
		}
		if (event) {
			count_vm_events(event, nr_src);
			nr -= nr_src;
			all = false;
		}
		dst = list_next_entry(dst, lru);
	}
	if (all)
		return nr;
	/* A flush for one is a flush for all of them. */
	count_vm_events(MIGRATE_DEFER_DENIED_MIXED, nr);
	return 0;
}

/* Why the node does not hold @nr pages more, or 0. ->lock is held. */
static int node_denial(struct defer_node *node, unsigned long nr)
{
	if (!enabled)
		return MIGRATE_DEFER_DENIED_OFF;
	if (atomic_read(&node->nr_reclaimers))
		return MIGRATE_DEFER_DENIED_RECLAIM;
	if (node->oldest && ktime_ms_delta(ktime_get(), node->oldest) >=
			    migrate_defer_debug_deadline(LATE_MS))
		return MIGRATE_DEFER_DENIED_LATE;
	if (node->nr_held + node->nr_promised + nr > node_cap(node->nid))
		return MIGRATE_DEFER_DENIED_CAP;
	return 0;
}

/* Takes over the flush that the task owes, and promises to hold @nr pages. */
static int promise(struct defer_node *node, unsigned long nr)
{
	int event;

	spin_lock(&node->lock);
	event = node_denial(node, nr);
	if (!event) {
		try_to_unmap_fold(&node->tlb);
		node->epoch = arch_tlbbatch_epoch();
		node->nr_promised += nr;
		start_deadline(node);
	}
	spin_unlock(&node->lock);
	return event;
}

static void mark(struct list_head *dsts)
{
	struct folio *dst;

	list_for_each_entry(dst, dsts, lru)
		if (dst->migrate_info & FOLIO_WAS_MAPPED)
			dst->migrate_info |= FOLIO_FLUSH_DEFERRED;
}

bool __migrate_defer_flush(struct list_head *srcs, struct list_head *dsts,
			   enum migrate_reason reason)
{
	struct defer_node *node;
	unsigned long nr;
	int event;

	if (!(REASONS & BIT(reason)) || list_empty(srcs) ||
	    !current->tlb_ubc.flush_required || !current->tlb_ubc.deferrable)
		return false;
	nr = deferrable_pages(srcs, dsts);
	if (!nr)
		return false;
	node = nodes[folio_nid(list_first_entry(srcs, struct folio, lru))];
	if (!node)
		return false;
	if (current->tlb_ubc.writable) {
		count_vm_events(MIGRATE_DEFER_DENIED_PTE, nr);
		return false;
	}
	event = promise(node, nr);
	if (event == MIGRATE_DEFER_DENIED_CAP && nr <= node_cap(node->nid)) {
		drain_node(node, MIGRATE_DEFER_CAP);
		event = promise(node, nr);
	}
	if (event) {
		count_vm_events(event, nr);
		return false;
	}
	mark(dsts);
	migrate_defer_debug_delay();
	return true;
}

void __migrate_defer_begin(void)
{
	try_to_unmap_flush();
	current->tlb_ubc.deferrable = true;
}

/* --- sources ---------------------------------------------------------------- */

static void keep_promise(struct defer_node *node, unsigned long nr)
{
	lockdep_assert_held(&node->lock);
	node->nr_promised -= nr;
	if (!node->nr_promised && !enabled)
		wake_up_var_locked(&node->nr_promised, &node->lock);
}

/**
 * __migrate_defer_source() - hold the source of a folio that has been migrated.
 * @src: the source, locked, not on any list
 * @dst: the destination, locked
 *
 * What @src refers to must not be written to before this has returned.
 */
void __migrate_defer_source(struct folio *src, struct folio *dst)
{
	struct defer_node *node = nodes[folio_nid(src)];
	struct address_space *mapping = dst->mapping;
	const unsigned long nr = folio_nr_pages(src);

	folio_get(src);
	migrate_defer_debug_hold(src);
	migrate_defer_debug_delay();
	if (!test_bit(AS_TLB_DEFERRED, &mapping->flags))
		set_bit(AS_TLB_DEFERRED, &mapping->flags);
	migrate_defer_debug_delay();

	mod_node_page_state(NODE_DATA(node->nid), NR_MIGRATE_DEFERRED, nr);
	spin_lock(&node->lock);
	list_add_tail(&src->lru, &node->folios);
	keep_promise(node, nr);
	WRITE_ONCE(node->nr_held, node->nr_held + nr);
	start_deadline(node);
	spin_unlock(&node->lock);
	count_vm_events(MIGRATE_DEFER_PAGES, nr);

	/* See "Writers". Pairs with get_write_access() and migrate_defer_writer(). */
	migrate_defer_debug_delay();
	smp_mb();
	if (inode_is_open_for_write(mapping->host))
		goto drain;
	/* Whoever has decremented i_writecount has cleared the flag before. */
	smp_rmb();
	if (test_bit(AS_TLB_DEFERRED, &mapping->flags))
		return;
drain:
	drain_node(node, MIGRATE_DEFER_WRITER);
}

/**
 * __migrate_defer_forget() - a source is mapped again instead of being held.
 * @src: the source
 *
 * What it has been unmapped from refers to it again: nobody need flush that.
 */
void __migrate_defer_forget(struct folio *src)
{
	struct defer_node *node = nodes[folio_nid(src)];

	spin_lock(&node->lock);
	keep_promise(node, folio_nr_pages(src));
	spin_unlock(&node->lock);
}

/**
 * migrate_defer_writer() - a file is opened for writing.
 * @inode: its inode, whose i_writecount has been incremented
 *
 * When this returns, nobody reads the file through old translations.
 *
 * Context: Process context, may sleep.
 */
void migrate_defer_writer(struct inode *inode)
{
	might_sleep();
	__migrate_defer_drain(NULL, MIGRATE_DEFER_WRITER);
	migrate_defer_debug_delay();
	/* Ordered before put_write_access(), which is not a barrier. */
	test_and_clear_bit(AS_TLB_DEFERRED, &inode->i_mapping->flags);
}
EXPORT_SYMBOL(migrate_defer_writer);

/* Nothing more is held of a node while somebody reclaims memory of it directly. */
bool __migrate_defer_pause(int nid)
{
	if (!nodes[nid])
		return false;
	atomic_inc(&nodes[nid]->nr_reclaimers);
	return true;
}

void migrate_defer_resume(int nid)
{
	atomic_dec(&nodes[nid]->nr_reclaimers);
}

/* --- on and off ------------------------------------------------------------- */

static void set_enabled(bool on)
{
	int nid;

	/* Whoever has ->lock later sees it */
	for_each_node(nid) {
		spin_lock(&nodes[nid]->lock);
		enabled = on;
		spin_unlock(&nodes[nid]->lock);
	}
}

static void switch_off(void)
{
	int nid;

	set_enabled(false);
	for_each_node(nid) {
		struct defer_node *node = nodes[nid];

		spin_lock(&node->lock);
		wait_var_event_spinlock(&node->nr_promised, !node->nr_promised,
					&node->lock);
		spin_unlock(&node->lock);
	}
	__migrate_defer_drain(NULL, MIGRATE_DEFER_OFF);
	static_branch_disable(&migrate_defer_on);
	arch_tlbbatch_track(false);
}

static void free_nodes(void)
{
	int nid;

	for_each_node(nid) {
		kfree(nodes[nid]);
		nodes[nid] = NULL;
	}
}

static int alloc_nodes(void)
{
	int nid;

	for_each_node(nid) {
		struct defer_node *node = kzalloc_obj(*node);

		if (!node) {
			free_nodes();
			return -ENOMEM;
		}
		spin_lock_init(&node->lock);
		INIT_LIST_HEAD(&node->folios);
		mutex_init(&node->drain);
		INIT_DELAYED_WORK(&node->deadline, deadline_work);
		node->nid = nid;
		nodes[nid] = node;
	}
	return 0;
}

static ssize_t enabled_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%d\n", static_key_enabled(&migrate_defer_on));
}

static ssize_t enabled_store(struct kobject *kobj, struct kobj_attribute *attr,
			     const char *buf, size_t count)
{
	bool on;
	int err = kstrtobool(buf, &on);

	if (err)
		return err;
	if (on && !arch_tlbbatch_can_wait())
		return -EOPNOTSUPP;
	mutex_lock(&switch_mutex);
	if (on) {
		arch_tlbbatch_track(true);
		static_branch_enable(&migrate_defer_on);
		set_enabled(true);
	} else {
		switch_off();
	}
	mutex_unlock(&switch_mutex);
	return count;
}

static struct kobj_attribute enabled_attr = __ATTR_RW(enabled);

static ssize_t max_kb_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", READ_ONCE(max_kb));
}

static ssize_t max_kb_store(struct kobject *kobj, struct kobj_attribute *attr,
			    const char *buf, size_t count)
{
	unsigned int kb;
	int err = kstrtouint(buf, 0, &kb);

	if (err)
		return err;
	WRITE_ONCE(max_kb, kb);
	return count;
}

static struct kobj_attribute max_kb_attr = __ATTR_RW(max_kb);

static struct attribute *migrate_defer_attrs[] = {
	&enabled_attr.attr,
	&max_kb_attr.attr,
	NULL,
};
ATTRIBUTE_GROUPS(migrate_defer);

static ssize_t cap_kb_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	int nid;

	for_each_node(nid)
		if (nodes[nid]->kobj == kobj)
			return sysfs_emit(buf, "%lu\n", node_cap(nid) << (PAGE_SHIFT - 10));
	return -ENODEV;
}

static struct kobj_attribute cap_kb_attr = __ATTR_RO(cap_kb);

static int __init migrate_defer_sysfs_init(void)
{
	struct kobject *kobj = kobject_create_and_add("migrate_defer", mm_kobj);
	char name[16];
	int nid, err;

	if (!kobj)
		return -ENOMEM;
	err = sysfs_create_groups(kobj, migrate_defer_groups);
	for_each_node(nid) {
		if (err)
			break;
		snprintf(name, sizeof(name), "node%d", nid);
		nodes[nid]->kobj = kobject_create_and_add(name, kobj);
		err = nodes[nid]->kobj ? sysfs_create_file(nodes[nid]->kobj, &cap_kb_attr.attr) :
					 -ENOMEM;
	}
	return err;
}

/* It takes no IPI; but what it was to flush need not wait for the deadline. */
static int cpu_offline(unsigned int cpu)
{
	migrate_defer_drain(MIGRATE_DEFER_CPU);
	return 0;
}

static int __init migrate_defer_init(void)
{
	int err = alloc_nodes();

	if (err)
		return err;
	deadline_wq = alloc_workqueue("migrate_defer",
				      WQ_UNBOUND | WQ_HIGHPRI | WQ_MEM_RECLAIM, 0);
	if (!deadline_wq) {
		free_nodes();
		return -ENOMEM;
	}
	cpuhp_setup_state_nocalls(CPUHP_AP_ONLINE_DYN, "mm/migrate_defer:online", NULL,
				  cpu_offline);
	return migrate_defer_sysfs_init();
}
subsys_initcall(migrate_defer_init);
