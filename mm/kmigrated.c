// SPDX-License-Identifier: GPL-2.0
/*
 * NUMA balancing that does not make the faulting task carry the memory.
 *
 * A NUMA hint fault decides that a folio is on the wrong node, and then migrates
 * it, one folio at a time, while the task waits. Here the task only notes which
 * folio it was, in a ring of its CPU, and goes on. A thread of the node that the
 * folio is wanted on migrates what it finds there, many folios at once, so that
 * they share a TLB flush, and one way to copy them (mm/migrate_copy.c).
 *
 *	hint fault, PTL held			kmigrated<node>
 *	--------------------			---------------
 *	all checks of today			wait for hints, then for more of them
 *	PFN, cookie, time -> ring		take a hint: PFN -> folio, reference
 *	map the page again			the same folio? young? still misplaced?
 *	wake the thread				isolate it, drop the reference
 *						migrate_pages() with all of them
 *
 * The page is mapped again before it is migrated, so that its TLB entries have to
 * be flushed, which is not so when the task migrates what nobody could access: to
 * queue pays only if several folios share that flush. A CPU therefore queues in
 * bursts only, see burst_pays(). Everything else is migrated by the task itself,
 * as if this file did not exist: see enum sync_cause.
 *
 * Invariants
 *
 * (1) A hint is no reference. Whatever has become of the folio since, it is freed,
 *     split, reclaimed or offlined as if nobody had thought of migrating it. A hint
 *     that fits another folio by now makes for a migration that is not needed,
 *     which is all that can go wrong; the cookie makes that rare.
 * (2) A folio is not moved to where a policy does not allow it, once the system
 *     call that set the policy has returned. See "Policies".
 * (3) There are never more than ring_size hints of a CPU, none is older than ttl_ms
 *     when it is used, and no more than batch_size folios are isolated for a node, or
 *     512 pages and one folio.
 * (4) Each hint is counted once when it is queued, and once more when it is done
 *     with: queued = migrated + failed + stale + expired + not isolated + waiting.
 *
 * Races with what happens between the fault and the migration
 *
 * - munmap(), MADV_DONTNEED, exit(), exec(), truncation, reclaim: the folio is free,
 *   or is not mapped: folio_try_get() or folio_mapped() fails. If its page is part
 *   of another folio: the cookie differs, of mapping, index and order.
 * - Split, collapse: the order is in the cookie, and is read again with a reference.
 * - fork(), KSM, mremap(), mprotect(), swap: nothing but rmap says where the folio
 *   is mapped when it is migrated.
 * - GUP, long-term pins, writeback, a lock: the checks of migrate_pages() for an
 *   unexpected reference; MIGRATE_ASYNC waits for nobody.
 * - Somebody else isolates or migrates it (compaction, demotion, a fault on another
 *   node): folio_isolate_lru() lets one of them have it.
 * - Two CPUs queue the same folio: it is on the right node, or somewhere else, when
 *   the second hint is looked at.
 * - It has become dirty, or the node full: as for the fault, it is left alone.
 * - Memory offlining: get_online_mems() from the PFN to the reference. That is
 *   waited for before a batch begins, so that nobody waits for both.
 * - A node that loses its memory keeps its thread: none of its CPUs queue anything,
 *   see should_numa_migrate_memory(). One that gets memory is given one.
 * - CPU hotplug: rings are those of all possible CPUs. What a CPU has left behind
 *   is taken from its ring like everything else. A CPU whose node is not what it
 *   was when rings were made, or was not known then, does not queue.
 * - Suspend: the thread freezes between batches, and goes on with the hints that it
 *   finds: jiffies stand still meanwhile.
 * - cgroups: a hint has no cgroup. Folios of different ones share a batch, each is
 *   counted for its own when it has been moved.
 *
 * Policies
 *
 * A hint is queued only for memory that has no policy but "where it is used", and
 * only to a node that the task may use: for others, the task migrates with its VMA
 * locked, and who changes the policy waits for it. Nobody waits for a hint. So who
 * changes something writes down when, and hints up to that moment are void:
 *
 *	hint fault			mbind() and others	kmigrated
 *	----------			------------------	---------
 *	note the time			lock, or change it	begin the flight
 *	(full barrier)			(full barrier)		(full barrier)
 *	is there a policy?		void: note the time	note the time
 *	queue it			(full barrier)		younger than void?
 *					wait for a flight	migrate, end the flight
 *
 * Either the fault sees what has been changed, or its time is not after that of the
 * void. And either the thread sees the void, or who changes the policy sees the
 * flight, and waits until it has ended: for what is in flight then, no other batch.
 *
 * Who may have queued what a policy forbids from now on? This mm; and another one that
 * maps the same memory, or did so: a parent that has exited, one that has a shmem file
 * mapped, whose policy is that of all. So hints are void by what the folio belongs to:
 * the root of its anon_vma, the inode, or the mm if it has neither. mbind(),
 * set_mempolicy() and migrate_pages() void the mm, and what its VMAs map; a cpuset, all
 * hints there are, as its tasks change one by one. Voids are kept by a hash, as
 * mm_struct has no room: hints of others may become void as well, which are not
 * missed. Who has so many voids that most hints come to nothing migrates by itself.
 *
 * Copies of pages of a shmem file that is mapped privately belong to the anon_vma of
 * one mm, but the policy is that of the file, which anybody may change: these are not
 * queued. What is not seen: memory of a process that has exited is used, within ttl_ms,
 * by one with a policy that it has had before, at the same PFN, with the same anon_vma
 * and index, so that the cookie fits.
 *
 * Locks
 *
 * A ring has one producer, its CPU with preemption disabled by the PTL, and one
 * consumer, the thread of its node. Neither takes a lock. Who voids hints may hold
 * mmap_lock and VMA locks, which a migration does not need; a flight takes the locks
 * of rmap, and no folio lock that it would have to wait for.
 */
#define pr_fmt(fmt) "kmigrated: " fmt

#include <linux/cpuset.h>
#include <linux/freezer.h>
#include <linux/hash.h>
#include <linux/init.h>
#include <linux/jiffies.h>
#include <linux/kobject.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/lockdep.h>
#include <linux/memory.h>
#include <linux/memory_hotplug.h>
#include <linux/mempolicy.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/node.h>
#include <linux/percpu.h>
#include <linux/sched/numa_balancing.h>
#include <linux/slab.h>
#include <linux/swap.h>
#include <linux/sysctl.h>
#include <linux/sysfs.h>
#include <linux/vmstat.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include <trace/events/migrate.h>

#include "internal.h"
#include "kmigrated.h"

#define PFN_BITS	44
#define OWNER_BITS	10
/* Hints that fit a page: what this takes for each CPU. */
#define RING_SLOTS	256
/* Folios or pages that are isolated at once: what migrate_pages() unmaps at most */
#define BATCH_MAX	512
/* A thread is late after that part of the time that a hint is good for, or two of hold_ms */
#define LAG_SHARE	8

/* What the faults of a CPU leave for the thread of its node. */
struct hint {
	u64 pfn:PFN_BITS;
	u64 mm:OWNER_BITS;	/* whose policy was looked at */
	u64 memory:OWNER_BITS;	/* what the folio belongs to */
	u32 cookie;		/* of the folio */
	u32 when;		/* jiffies */
};

/* How many folios a CPU would have queued in the present period, and in the last. */
struct burst {
	u64 since;
	unsigned int seen;
	unsigned int before;
};

struct ring {
	/* Of the CPU that has hint faults */
	struct hint *hints;
	struct burst burst;
	int nid;
	unsigned int head;
	/* Of the thread of the node */
	unsigned int tail ____cacheline_aligned_in_smp;
	unsigned int batch_mm;	/* whose hints are in the batch: slot + 1, or 0 */
	unsigned int failed_mm;	/* who is to be told of a failure, likewise */
};

struct knode {
	int nid;
	struct task_struct *task;
	struct cpumask cpus;
	wait_queue_head_t idle;		/* the thread: for a hint */
	wait_queue_head_t full;		/* the thread: for enough of them */
	wait_queue_head_t landed;	/* others: for the end of a batch */
	unsigned int flight;		/* odd while there is one */
	u64 started;			/* jiffies: when the last one began */
	unsigned int nr_flying;		/* hints taken that are not counted yet */
	unsigned int failing;		/* average share of failures, percent */
	int next_cpu;			/* whose ring to begin with */
	u64 sync_until;			/* jiffies: too many have failed */
};

/* What has become of a hint. The order is that of the vmstat items. */
enum hint_fate {
	HINT_MIGRATED,
	HINT_FAILED,
	HINT_STALE,		/* the folio is not what, or where, it was */
	HINT_EXPIRED,		/* too old, or void */
	HINT_NOT_ISOLATED,	/* as the fault would have found by now */
	NR_HINT_FATES,
	IN_BATCH = NR_HINT_FATES
};

/* Why a task migrates a folio itself. The order is that of the vmstat items. */
enum sync_cause {
	SYNC_POLICY,		/* not simply "where it is used", or not there */
	SYNC_FAILING,		/* the thread had little success of late */
	SYNC_SMALL,		/* too few at a time to pay for a flush */
	SYNC_LAGGING,		/* the thread does not come to it */
	SYNC_FULL,
	NR_SYNC_CAUSES,
	QUEUE = NR_SYNC_CAUSES
};

struct batch {
	struct knode *knode;
	struct list_head folios;
	unsigned int nr_taken;		/* hints */
	unsigned int nr_isolated;
	unsigned int nr_pages;
	unsigned int nr_dst;		/* destinations that are in use */
	unsigned int fates[NR_HINT_FATES];
};

DEFINE_STATIC_KEY_FALSE(kmigrated_on);

static DEFINE_PER_CPU(struct ring, rings);
static struct knode *knodes[MAX_NUMNODES];
/* jiffies of the last void: of an owner, and of all */
static u64 voided[1 << OWNER_BITS];
static u64 voided_all;
static DEFINE_MUTEX(switch_mutex);
/* Hints: only while everybody who changes a policy voids them, see switch_off() */
static bool accepting;

static unsigned int batch_size = 64;
static unsigned int smallest_batch = 8;
/* More would be left over when a burst ends, for a thread whose CPUs are busy */
static unsigned int ring_size = 64;
static unsigned int hold_ms = 4;
static unsigned int ttl_ms = 1000;
/* ... in jiffies */
static unsigned int hold = DIV_ROUND_UP(4 * HZ, MSEC_PER_SEC);
static unsigned int ttl = HZ;

#ifdef CONFIG_LOCKDEP
static struct lockdep_map flight_map = STATIC_LOCKDEP_MAP_INIT("kmigrated_flight", &flight_map);
#endif

/* --- hints ----------------------------------------------------------------- */

static unsigned int owner_slot(const void *owner)
{
	return hash_ptr(owner, OWNER_BITS);
}

static u32 folio_cookie(const struct folio *folio)
{
	const u64 mapping = (unsigned long)READ_ONCE(folio->mapping);

	return hash_64(mapping + READ_ONCE(folio->index) * GOLDEN_RATIO_64 +
		       ((u64)folio_order(folio) << 56), 32);
}

/* When a hint was queued, of which only 32 bits are known. */
static u64 hint_time(const struct hint *hint, u64 now)
{
	return now - (u32)(lower_32_bits(now) - hint->when);
}

static bool hint_expired(const struct hint *hint, u64 now)
{
	const u64 when = hint_time(hint, now);

	return now - when > READ_ONCE(ttl) ||
	       READ_ONCE(voided[hint->memory]) >= when ||
	       READ_ONCE(voided_all) >= when;
}

/*
 * Is this one of at least @smallest within two periods? The first ones of a burst
 * are not queued, as nobody knows that more will come; those of the next period are.
 */
static bool burst_pays(struct burst *burst, u64 now, unsigned int period,
		       unsigned int smallest)
{
	const u64 age = now - burst->since;

	if (age >= period) {
		burst->before = age < 2 * period ? burst->seen : 0;
		burst->seen = 0;
		burst->since = now;
	}
	burst->seen++;
	return max(burst->seen, burst->before) >= smallest;
}

/* --- rings ----------------------------------------------------------------- */

/* Others than its producer and its consumer may find too many. */
static unsigned int ring_len(const struct ring *ring)
{
	/* The tail first: it is never ahead of what the head is then */
	const unsigned int tail = smp_load_acquire(&ring->tail);

	return READ_ONCE(ring->head) - tail;
}

static struct hint *ring_slot(struct ring *ring, unsigned int nr)
{
	return &ring->hints[nr % RING_SLOTS];
}

/*
 * The thread should have come to it long ago. A hint that expires is worse than none:
 * its page is not looked at again before the next scan. The slot of the oldest one is
 * used again only by this CPU.
 */
static bool ring_lags(struct ring *ring, u64 now)
{
	const unsigned int tail = READ_ONCE(ring->tail);

	return ring->head != tail &&
	       now - hint_time(ring_slot(ring, tail), now) >
	       max(READ_ONCE(ttl) / LAG_SHARE, 2 * READ_ONCE(hold));
}

static void ring_push(struct ring *ring, const struct hint *hint)
{
	const unsigned int head = ring->head;

	*ring_slot(ring, head) = *hint;
	/* Pairs with the acquire in ring_pop(): the thread sees what is in the slot */
	smp_store_release(&ring->head, head + 1);
}

static bool ring_pop(struct ring *ring, struct hint *hint)
{
	const unsigned int tail = ring->tail;

	/* What is in the slot is read after this: pairs with ring_push() */
	if (smp_load_acquire(&ring->head) == tail)
		return false;
	*hint = *ring_slot(ring, tail);
	/* The slot has been read before it is free: pairs with ring_has_room() */
	smp_store_release(&ring->tail, tail + 1);
	return true;
}

static bool ring_has_room(const struct ring *ring)
{
	/* What was in the slot has been read: pairs with ring_pop() */
	return ring->head - smp_load_acquire(&ring->tail) < READ_ONCE(ring_size);
}

/* --- hint faults ------------------------------------------------------------ */

/* Memory without a policy, of a task that may use the node. */
static bool policy_allows(struct vm_fault *vmf, struct folio *folio, int nid)
{
	const struct vm_operations_struct *ops = vmf->vma->vm_ops;

	/* The policy of a file, which is not what the folio belongs to */
	if (folio_test_anon(folio) && ops && ops->get_policy)
		return false;
	return node_isset(nid, cpuset_current_mems_allowed) &&
	       mpol_is_default(vmf->vma, vmf->address, folio_order(folio));
}

static enum sync_cause why_sync(struct ring *ring, struct folio *folio, struct vm_fault *vmf,
				int nid, u64 now)
{
	struct knode *knode = READ_ONCE(knodes[nid]);

	if (!knode || !READ_ONCE(knode->task) || !ring->hints || ring->nid != nid ||
	    folio_pfn(folio) >> PFN_BITS || !policy_allows(vmf, folio, nid))
		return SYNC_POLICY;
	if (now < READ_ONCE(knode->sync_until))
		return SYNC_FAILING;
	/* A folio that a PMD could map is a batch by itself */
	if (folio_test_pmd_mappable(folio) ||
	    !burst_pays(&ring->burst, now, READ_ONCE(hold), READ_ONCE(smallest_batch)))
		return SYNC_SMALL;
	if (ring_lags(ring, now))
		return SYNC_LAGGING;
	return ring_has_room(ring) ? QUEUE : SYNC_FULL;
}

/* What others may void the hint by, who map the same memory. */
static const void *memory_owner(const struct vm_area_struct *vma, const struct folio *folio)
{
	const struct anon_vma *anon_vma;

	if (!folio_test_anon(folio))
		return vma->vm_file ? (void *)vma->vm_file->f_mapping->host : vma->vm_mm;
	/* None of KSM, which moves for everybody; it may become that now: no PTL there */
	anon_vma = folio_anon_vma(folio);
	return anon_vma ? (void *)anon_vma->root : vma->vm_mm;
}

/* Something that the same mm may have queued on this CPU was not migrated. */
static bool was_told_failure(struct ring *ring, const struct hint *hint)
{
	if (READ_ONCE(ring->failed_mm) != hint->mm + 1)
		return false;
	WRITE_ONCE(ring->failed_mm, 0);
	return true;
}

/* Nothing more can come from one CPU when its ring is full. */
static unsigned int enough(void)
{
	return min(READ_ONCE(batch_size), READ_ONCE(ring_size));
}

static void wake_thread(struct knode *knode, unsigned int nr_waiting)
{
	/* Not only for the first one in a ring: who empties it may not see it yet */
	if (wq_has_sleeper(&knode->idle))
		wake_up(&knode->idle);
	/* A wake-up that is lost costs no more than the rest of hold_ms */
	else if (nr_waiting == enough() && waitqueue_active(&knode->full))
		wake_up(&knode->full);
}

/**
 * __migrate_misplaced_folio_later() - queue a folio to be migrated.
 * @folio: a folio that is on the wrong node
 * @vmf: the NUMA hint fault that found it
 * @nid: the node it should be on
 * @flags: TNF_*, for task_numa_fault(). TNF_MIGRATE_FAIL is set if something that
 *	this CPU had queued before could not be migrated, so that NUMA balancing
 *	scans less often, as if the task had tried to.
 *
 * Context: The PTL is held. Wakes a thread, allocates nothing.
 * Return: false if the caller has to migrate the folio, if anybody.
 */
bool __migrate_misplaced_folio_later(struct folio *folio, struct vm_fault *vmf,
				     int nid, int *flags)
{
	struct ring *ring = this_cpu_ptr(&rings);
	const u64 now = get_jiffies_64();
	enum sync_cause cause;
	struct hint hint;

	lockdep_assert_held(vmf->ptl);
	if (!READ_ONCE(accepting))
		return false;
	/* The time first, then policies: see "Policies" */
	smp_mb();
	cause = why_sync(ring, folio, vmf, nid, now);
	if (cause != QUEUE) {
		count_vm_event(NUMA_ASYNC_SYNC_POLICY + cause);
		return false;
	}
	/* It fails once more for the caller, who says so */
	if (migrate_misplaced_folio_check(folio, vmf->vma, nid))
		return false;

	hint = (struct hint) {
		.pfn = folio_pfn(folio),
		.mm = owner_slot(vmf->vma->vm_mm),
		.memory = owner_slot(memory_owner(vmf->vma, folio)),
		.cookie = folio_cookie(folio),
		.when = lower_32_bits(now),
	};
	lockdep_assert_preemption_disabled();
	VM_WARN_ON_ONCE(ring_len(ring) >= RING_SLOTS);
	ring_push(ring, &hint);
	count_vm_event(NUMA_ASYNC_QUEUED);
	if (was_told_failure(ring, &hint))
		*flags |= TNF_MIGRATE_FAIL;
	wake_thread(knodes[nid], ring_len(ring));
	return true;
}

/* --- voiding hints ----------------------------------------------------------- */

static void flight_begin(struct knode *knode)
{
	lock_map_acquire(&flight_map);
	WRITE_ONCE(knode->started, get_jiffies_64());
	/* Who sees the flight sees since when: pairs with flight_wait() */
	smp_store_release(&knode->flight, knode->flight + 1);
	/* Pairs with that of voids_end() */
	smp_mb();
}

static void flight_end(struct knode *knode)
{
	/* Who waits sees all that has been done */
	smp_store_release(&knode->flight, knode->flight + 1);
	if (wq_has_sleeper(&knode->landed))
		wake_up_all(&knode->landed);
	lock_map_release(&flight_map);
}

/* What it has done is seen by who finds that it has ended: pairs with flight_end(). */
static bool flight_has_ended(const struct knode *knode, unsigned int flight)
{
	/* There may be another one by now, which is not waited for */
	return smp_load_acquire(&knode->flight) != flight;
}

/* One that began after @now, when there was a void already, has seen that. */
static void flight_wait(struct knode *knode, u64 now)
{
	/* That of one that has ended is seen, or since when there is one */
	const unsigned int flight = smp_load_acquire(&knode->flight);

	if (flight & 1 && READ_ONCE(knode->started) <= now)
		wait_event(knode->landed, flight_has_ended(knode, flight));
}

/* A void that is older than what has been noted already changes nothing. */
static void note_void(u64 *when)
{
	const u64 now = get_jiffies_64();
	u64 old = READ_ONCE(*when);

	while (old < now && !try_cmpxchg64(when, &old, now))
		;
}

static void void_owner(const void *owner)
{
	note_void(&voided[owner_slot(owner)]);
}

static void voids_begin(void)
{
	might_sleep();
	lock_map_acquire(&flight_map);
	lock_map_release(&flight_map);
	/* What the caller has changed is seen by who notes a later time */
	smp_mb();
}

static void voids_end(void)
{
	struct knode *knode;
	u64 now;
	int nid;

	/* Pairs with that of flight_begin() */
	smp_mb();
	now = get_jiffies_64();
	for_each_node(nid) {
		knode = READ_ONCE(knodes[nid]);
		if (knode)
			flight_wait(knode, now);
	}
}

/**
 * __kmigrated_void() - forget what has been queued for somebody's memory.
 * @mm: who has changed what is allowed
 * @start: ... for this memory
 * @end: ... up to here
 *
 * Context: mmap_lock is held. Sleeps until batches that are being migrated, one of a
 *	node, have been. Folio locks and those of rmap may not be held.
 */
void __kmigrated_void(struct mm_struct *mm, unsigned long start, unsigned long end)
{
	VMA_ITERATOR(vmi, mm, start);
	struct vm_area_struct *vma;

	mmap_assert_locked(mm);
	voids_begin();
	void_owner(mm);
	for_each_vma_range(vmi, vma, end) {
		const struct anon_vma *anon_vma = READ_ONCE(vma->anon_vma);

		if (anon_vma)
			void_owner(anon_vma->root);
		if (vma->vm_file)
			void_owner(vma->vm_file->f_mapping->host);
	}
	voids_end();
}

/**
 * kmigrated_void_all() - forget all that has been queued.
 *
 * Context: as __kmigrated_void(), but for mmap_lock, which need not be held.
 */
void kmigrated_void_all(void)
{
	if (!static_branch_unlikely(&kmigrated_on))
		return;
	voids_begin();
	note_void(&voided_all);
	voids_end();
}

/* --- the thread ------------------------------------------------------------- */

static void count_fate(struct batch *batch, enum hint_fate fate, unsigned int nr)
{
	batch->fates[fate] += nr;
	count_vm_events(NUMA_ASYNC_MIGRATED + fate, nr);
}

/* The folio of a hint, with a reference. */
static struct folio *hint_folio(const struct hint *hint)
{
	struct page *page = pfn_to_online_page(hint->pfn);
	struct folio *folio;

	if (!page || PageTail(page))
		return NULL;
	folio = page_folio(page);
	if (!folio_try_get(folio))
		return NULL;
	if (page_folio(page) == folio && folio_test_lru(folio) &&
	    folio_cookie(folio) == hint->cookie)
		return folio;
	folio_put(folio);
	return NULL;
}

/* The checks of the fault once more, but for those of the VMA. */
static enum hint_fate take_folio(struct batch *batch, const struct hint *hint)
{
	const int nid = batch->knode->nid;
	enum hint_fate fate = HINT_STALE;
	struct folio *folio;

	if (hint_expired(hint, get_jiffies_64()))
		return HINT_EXPIRED;
	folio = hint_folio(hint);
	if (!folio)
		return HINT_STALE;
	/* Migration would split what is partially mapped, and move the pieces later */
	if (folio_nid(folio) != nid && folio_mapped(folio) &&
	    !(folio_order(folio) > 1 && folio_test_partially_mapped(folio))) {
		fate = HINT_NOT_ISOLATED;
		if (!migrate_misplaced_folio_check(folio, NULL, nid) &&
		    migrate_misplaced_folio_isolate(folio)) {
			list_add_tail(&folio->lru, &batch->folios);
			batch->nr_isolated++;
			batch->nr_pages += folio_nr_pages(folio);
			fate = IN_BATCH;
		}
	}
	folio_put(folio);
	return fate;
}

static void take_hint(struct batch *batch, struct ring *ring, const struct hint *hint)
{
	const enum hint_fate fate = take_folio(batch, hint);

	batch->nr_taken++;
	if (fate == IN_BATCH)
		ring->batch_mm = hint->mm + 1;
	else if (fate == HINT_NOT_ISOLATED)
		WRITE_ONCE(ring->failed_mm, hint->mm + 1);
	if (fate != IN_BATCH)
		count_fate(batch, fate, 1);
}

/* All that are waiting, or a batch; each CPU is the first one at some time. */
static void take_hints(struct batch *batch)
{
	struct knode *knode = batch->knode;
	const unsigned int most = READ_ONCE(batch_size);
	struct hint hint;
	int cpu;

	for_each_cpu_wrap(cpu, &knode->cpus, knode->next_cpu) {
		struct ring *ring = per_cpu_ptr(&rings, cpu);

		ring->batch_mm = 0;
		while (batch->nr_taken < most && batch->nr_pages < BATCH_MAX) {
			/* It is always counted, as waiting or as flying, or both */
			WRITE_ONCE(knode->nr_flying, batch->nr_taken + 1);
			if (!ring_pop(ring, &hint))
				break;
			take_hint(batch, ring, &hint);
		}
	}
	knode->next_cpu = cpumask_next_wrap(knode->next_cpu, &knode->cpus);
}

static struct folio *alloc_dst(struct folio *src, unsigned long private)
{
	struct batch *batch = (struct batch *)private;
	struct folio *dst = alloc_misplaced_dst_folio(src, batch->knode->nid);

	if (dst)
		batch->nr_dst++;
	return dst;
}

static void free_dst(struct folio *dst, unsigned long private)
{
	struct batch *batch = (struct batch *)private;

	batch->nr_dst--;
	folio_put(dst);
}

/*
 * Nobody is there to be told: the next task that queues on that CPU is, if it is of the
 * mm that the last one in the batch was of. A batch of several mms may tell the wrong one,
 * whose memory is looked at less often then.
 */
static void tell_failure(struct knode *knode)
{
	int cpu;

	for_each_cpu(cpu, &knode->cpus) {
		struct ring *ring = per_cpu_ptr(&rings, cpu);

		if (ring->batch_mm)
			WRITE_ONCE(ring->failed_mm, ring->batch_mm);
	}
}

static void migrate_batch(struct batch *batch)
{
	unsigned int left, migrated;

	if (!batch->nr_isolated)
		return;
	migrate_pages(&batch->folios, alloc_dst, free_dst, (unsigned long)batch,
		      MIGRATE_ASYNC, MR_NUMA_MISPLACED, NULL);
	/* Pieces of one that had to be split after all were one hint */
	left = min_t(unsigned int, list_count_nodes(&batch->folios), batch->nr_isolated);
	if (left) {
		putback_movable_pages(&batch->folios);
		tell_failure(batch->knode);
	}
	/* What was freed meanwhile has taken no destination */
	migrated = min(batch->nr_dst, batch->nr_isolated - left);
	count_fate(batch, HINT_FAILED, left);
	count_fate(batch, HINT_MIGRATED, migrated);
	count_fate(batch, HINT_STALE, batch->nr_isolated - left - migrated);
	count_vm_event(NUMA_ASYNC_BATCHES);
}

/* Hints are not worth much if most of them come to nothing: tasks do better then. */
static void note_failures(struct batch *batch)
{
	struct knode *knode = batch->knode;
	const unsigned int failed = batch->fates[HINT_FAILED] + batch->fates[HINT_EXPIRED] +
				    batch->fates[HINT_NOT_ISOLATED];
	const unsigned int tried = failed + batch->fates[HINT_MIGRATED];

	if (!tried)
		return;
	knode->failing = (7 * knode->failing + 100 * failed / tried) / 8;
	if (knode->failing > 50) {
		WRITE_ONCE(knode->sync_until, get_jiffies_64() + HZ);
		knode->failing = 0;
	}
}

static void do_batch(struct knode *knode)
{
	struct batch batch = {
		.knode = knode,
		.folios = LIST_HEAD_INIT(batch.folios),
	};
	u64 start;

	get_online_mems();
	start = ktime_get_ns();
	flight_begin(knode);
	if (!kmigrated_debug_paused())
		take_hints(&batch);
	put_online_mems();
	VM_WARN_ON_ONCE(batch.nr_isolated > batch.nr_taken || batch.nr_taken > BATCH_MAX);
	kmigrated_debug_flight();
	migrate_batch(&batch);
	flight_end(knode);

	trace_numa_async_batch(knode->nid, batch.nr_taken, batch.nr_isolated, batch.nr_pages,
			       batch.fates[HINT_MIGRATED], ktime_get_ns() - start);
	note_failures(&batch);
	WRITE_ONCE(knode->nr_flying, 0);
}

static unsigned int nr_waiting(const struct knode *knode)
{
	unsigned int nr = 0;
	int cpu;

	for_each_cpu(cpu, &knode->cpus)
		nr += ring_len(per_cpu_ptr(&rings, cpu));
	return nr;
}

static bool has_waiting(const struct knode *knode, unsigned int nr)
{
	return kthread_should_stop() ||
	       (!kmigrated_debug_paused() && nr_waiting(knode) >= nr);
}

/* Nobody queues any more. */
static void drop_hints(struct knode *knode)
{
	struct hint hint;
	int cpu;

	for_each_cpu(cpu, &knode->cpus)
		while (ring_pop(per_cpu_ptr(&rings, cpu), &hint))
			count_vm_event(NUMA_ASYNC_EXPIRED);
}

#ifdef CONFIG_NUMA_BALANCING_ASYNC_DEBUG
/* "paused" has changed: nothing that is queued from now on is in a batch before it does. */
void kmigrated_debug_changed(void)
{
	int nid;

	voids_end();
	for_each_node(nid)
		if (knodes[nid])
			wake_up(&knodes[nid]->idle);
}
#endif

static int kmigrated(void *data)
{
	struct knode *knode = data;

	set_freezable();
	while (!kthread_should_stop()) {
		wait_event_freezable(knode->idle, has_waiting(knode, 1));
		wait_event_freezable_timeout(knode->full,
					     has_waiting(knode, enough()), READ_ONCE(hold));
		if (!kthread_should_stop())
			do_batch(knode);
		cond_resched();
	}
	return 0;
}

/* --- switching ---------------------------------------------------------------- */

static int run_thread(struct knode *knode)
{
	struct task_struct *task;

	if (knode->task || !node_state(knode->nid, N_MEMORY) || cpumask_empty(&knode->cpus))
		return 0;
	task = kthread_create_on_node(kmigrated, knode, knode->nid, "kmigrated%d", knode->nid);
	if (IS_ERR(task))
		return PTR_ERR(task);
	knode->failing = 0;
	WRITE_ONCE(knode->sync_until, 0);
	wake_up_process(task);
	WRITE_ONCE(knode->task, task);
	return 0;
}

static void stop_threads(void)
{
	int nid;

	for_each_node(nid) {
		struct knode *knode = knodes[nid];

		if (!knode || !knode->task)
			continue;
		kthread_stop(knode->task);
		knode->task = NULL;
		/* Not by the thread, which may never have run */
		drop_hints(knode);
	}
}

static int run_threads(void)
{
	int nid, err;

	for_each_node(nid) {
		err = run_thread(knodes[nid]);
		if (err) {
			stop_threads();
			return err;
		}
	}
	return 0;
}

static struct knode *alloc_knode(int nid)
{
	struct knode *knode = kzalloc_node(sizeof(*knode), GFP_KERNEL, node_state(nid, N_MEMORY) ?
					   nid : NUMA_NO_NODE);

	if (!knode)
		return NULL;
	knode->nid = nid;
	init_waitqueue_head(&knode->idle);
	init_waitqueue_head(&knode->full);
	init_waitqueue_head(&knode->landed);
	return knode;
}

static int alloc_ring(int cpu)
{
	struct ring *ring = per_cpu_ptr(&rings, cpu);
	const int nid = cpu_to_node(cpu);

	if (ring->hints || nid == NUMA_NO_NODE)
		return 0;
	ring->hints = kcalloc_node(RING_SLOTS, sizeof(struct hint), GFP_KERNEL,
				   node_state(nid, N_MEMORY) ? nid : NUMA_NO_NODE);
	if (!ring->hints)
		return -ENOMEM;
	ring->nid = nid;
	cpumask_set_cpu(cpu, &knodes[nid]->cpus);
	return 0;
}

/* It is kept when kmigrated is switched off: nobody has to wait for who looks at it. */
static int alloc_all(void)
{
	int nid, cpu, err;

	BUILD_BUG_ON(sizeof(struct hint) * RING_SLOTS > SZ_4K);
	for_each_node(nid) {
		if (!knodes[nid])
			WRITE_ONCE(knodes[nid], alloc_knode(nid));
		if (!knodes[nid])
			return -ENOMEM;
	}
	for_each_possible_cpu(cpu) {
		err = alloc_ring(cpu);
		if (err)
			return err;
	}
	return 0;
}

static int switch_on(void)
{
	int err = alloc_all();

	if (!err)
		err = run_threads();
	if (!err) {
		static_branch_enable(&kmigrated_on);
		WRITE_ONCE(accepting, true);
	}
	return err;
}

static void switch_off(void)
{
	WRITE_ONCE(accepting, false);
	/* Who has seen it queues with preemption disabled */
	synchronize_rcu();
	stop_threads();
	kmigrated_debug_stopped();
	/* Nothing is in flight that somebody would have to wait for */
	static_branch_disable(&kmigrated_on);
}

static int set_enabled(bool on)
{
	int err = 0;

	mutex_lock(&switch_mutex);
	if (on == static_key_enabled(&kmigrated_on))
		;
	else if (on)
		err = switch_on();
	else
		switch_off();
	mutex_unlock(&switch_mutex);
	return err;
}

static void run_more_threads(struct work_struct *work)
{
	int nid;

	mutex_lock(&switch_mutex);
	for_each_node(nid)
		if (static_key_enabled(&kmigrated_on) && run_thread(knodes[nid]))
			pr_warn("no thread for node %d: tasks migrate to it themselves\n", nid);
	mutex_unlock(&switch_mutex);
}

static DECLARE_WORK(run_work, run_more_threads);

/*
 * A node that gets its first memory may be migrated to. Not here: a thread that is
 * being stopped, with the mutex held, may wait for the lock that is held now.
 */
static int node_callback(struct notifier_block *self, unsigned long action, void *arg)
{
	if (action == NODE_ADDED_FIRST_MEMORY)
		schedule_work(&run_work);
	return NOTIFY_OK;
}

static int sysctl_numa_balancing_async(const struct ctl_table *table, int write, void *buffer,
				       size_t *lenp, loff_t *ppos)
{
	int on = static_key_enabled(&kmigrated_on);
	const struct ctl_table once = {
		.data = &on,
		.maxlen = sizeof(on),
		.extra1 = SYSCTL_ZERO,
		.extra2 = SYSCTL_ONE,
	};
	int err;

	if (write && !capable(CAP_SYS_ADMIN))
		return -EPERM;
	err = proc_dointvec_minmax(&once, write, buffer, lenp, ppos);
	return err || !write ? err : set_enabled(on);
}

static const struct ctl_table kmigrated_sysctls[] = {
	{
		.procname	= "numa_balancing_async",
		.mode		= 0644,
		.maxlen		= sizeof(int),
		.proc_handler	= sysctl_numa_balancing_async,
	},
};

/* --- limits -------------------------------------------------------------------- */

struct limit {
	struct kobj_attribute attr;
	unsigned int *value;
	unsigned int min;
	unsigned int max;
	unsigned int *jiffies;
};

static ssize_t limit_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	const struct limit *limit = container_of(attr, struct limit, attr);

	return sysfs_emit(buf, "%u\n", READ_ONCE(*limit->value));
}

static ssize_t limit_store(struct kobject *kobj, struct kobj_attribute *attr,
			   const char *buf, size_t count)
{
	const struct limit *limit = container_of(attr, struct limit, attr);
	unsigned int value;
	int err = kstrtouint(buf, 0, &value);

	if (err)
		return err;
	if (value < limit->min || value > limit->max)
		return -EINVAL;
	WRITE_ONCE(*limit->value, value);
	if (limit->jiffies)
		WRITE_ONCE(*limit->jiffies, msecs_to_jiffies(value));
	return count;
}

static struct limit limits[] = {
	{ __ATTR(batch_size, 0644, limit_show, limit_store), &batch_size, 1, BATCH_MAX },
	{ __ATTR(smallest_batch, 0644, limit_show, limit_store), &smallest_batch, 1, BATCH_MAX },
	{ __ATTR(hold_ms, 0644, limit_show, limit_store), &hold_ms, 1, 1000, &hold },
	{ __ATTR(ttl_ms, 0644, limit_show, limit_store), &ttl_ms, 1, 60000, &ttl },
	{ __ATTR(ring_size, 0644, limit_show, limit_store), &ring_size, 1, RING_SLOTS },
};

static ssize_t waiting_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	unsigned int nr = 0;
	int nid;

	for_each_node(nid) {
		if (!knodes[nid])
			continue;
		/* In this order: what is taken meanwhile is counted twice, not never */
		nr += nr_waiting(knodes[nid]);
		nr += READ_ONCE(knodes[nid]->nr_flying);
	}
	return sysfs_emit(buf, "%u\n", nr);
}

static struct kobj_attribute waiting_attr = __ATTR_RO(waiting);

static struct attribute *kmigrated_attrs[] = {
	&limits[0].attr.attr,
	&limits[1].attr.attr,
	&limits[2].attr.attr,
	&limits[3].attr.attr,
	&limits[4].attr.attr,
	&waiting_attr.attr,
	NULL,
};
ATTRIBUTE_GROUPS(kmigrated);

static int __init kmigrated_init(void)
{
	struct kobject *kobj = kobject_create_and_add("kmigrated", mm_kobj);
	int err;

	if (!kobj)
		return -ENOMEM;
	err = sysfs_create_groups(kobj, kmigrated_groups);
	if (err) {
		kobject_put(kobj);
		return err;
	}
	register_sysctl_init("kernel", kmigrated_sysctls);
	hotplug_node_notifier(node_callback, DEFAULT_CALLBACK_PRI);
	return 0;
}
late_initcall(kmigrated_init);

#include "tests/kmigrated_kunit.h"
