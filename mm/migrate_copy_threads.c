// SPDX-License-Identifier: GPL-2.0
/*
 * Copy the folios of a batch with several CPUs.
 *
 * The pages of a batch, one folio after the other, are taken in slices of 64 KiB,
 * by whoever comes next: who migrates, and helpers on CPUs that were idle when the
 * batch began. So folios are copied in the order in which they will be moved, a
 * large one by several CPUs, and nobody depends on somebody else for what has not
 * been taken:
 *
 * - Who migrates moves a folio when all its slices are there. Until then he takes
 *   slices himself. If no helper ever runs, he copies everything.
 * - He waits only for slices that a helper has taken. Helpers are not preempted
 *   from taking a slice to its end: it is as long as one slice takes, unless the
 *   CPU has interrupts to serve, or a hypervisor takes it away.
 * - A helper that comes too late finds nothing to take. The batch stays until it
 *   has been there, unless its work could be cancelled.
 *
 * A slice that is complete is subtracted, with release order, from what is left of
 * each folio that it has pages of; who migrates reads zero with acquire order. From
 * then on a helper does not touch the folio: it may be freed.
 *
 * Who helps
 *
 * One CPU per last-level cache, those of other caches first: the CPUs that share a
 * cache share its way to memory, and one of them can fill it. CPUs must be idle,
 * allowed to the task that migrates, and allowed to unbound workqueues. There are
 * no more than pay for being woken up. If none is idle, there is no batch, and
 * folios are copied as they are moved. So a busy machine is not slowed down. The
 * scheduler wakes a helper at the cache for which it has been queued, and may have
 * reasons to put it elsewhere, as any work of an unbound workqueue.
 *
 * Time that helpers spend is charged to the cgroup of the task that migrates. If
 * that, or any above it, is limited in its CPU time, it has to copy by itself.
 */
#include <linux/cgroup.h>
#include <linux/cpumask.h>
#include <linux/kobject.h>
#include <linux/kstrtox.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/sched/topology.h>
#include <linux/sysfs.h>
#include <linux/vmstat.h>
#include <linux/workqueue.h>

#include <trace/events/migrate.h>

#include "internal.h"
#include "migrate_copy.h"

#define SLICE		(SZ_64K >> PAGE_SHIFT ?: 1)
/* What a CPU copies while another one is woken up, several times over. */
#define SHARE		max(SZ_256K, PAGE_SIZE)
/* CPUs that are asked whether they are idle: each is a cache miss or two. */
#define NR_PROBES	32
/* CPUs that are asked whose cache they share, which hardly ever changes. */
#define NR_LOOKS	256

static struct workqueue_struct *helpers_wq;
static unsigned int max_helpers = 7;

static void copy_part(struct copy_item *item, unsigned long offset, unsigned long nr)
{
	/* Who has met poison does not need the rest. */
	if (READ_ONCE(item->err))
		return;
	if (copy_migrated_pages(folio_page(item->dst, offset),
				folio_page(item->src, offset), nr))
		WRITE_ONCE(item->err, -EHWPOISON);
}

struct slice {
	struct copy_item *item;		/* that has the first page */
	unsigned long page;		/* of the batch */
	unsigned long end;
};

/* The part of @item that is in @slice. */
static unsigned long part_of(const struct slice *slice, const struct copy_item *item,
			     unsigned long *offset)
{
	const unsigned long begin = max(slice->page, item->first);

	*offset = begin - item->first;
	return min(slice->end - begin, folio_nr_pages(item->src) - *offset);
}

static void copy_slice(const struct slice *slice)
{
	struct copy_item *item = slice->item;
	unsigned long page, offset, nr;

	for (page = slice->page; page < slice->end; page += nr, item++) {
		nr = part_of(slice, item, &offset);
		copy_part(item, offset, nr);
	}
}

/* Folios may be gone when their last page is said to be there. */
static void finish_slice(const struct slice *slice)
{
	struct copy_item *item = slice->item;
	unsigned long page, offset, nr;

	for (page = slice->page; page < slice->end; page += nr, item++) {
		nr = part_of(slice, item, &offset);
		/* Pairs with the acquire in threads_wait(). */
		atomic_sub_return_release(nr, &item->left);
	}
}

static bool take_slice(struct copy_batch *batch, struct slice *slice)
{
	/* Who waits comes back again and again: not to count round to zero. */
	if (atomic_long_read(&batch->taken) >= batch->nr_pages)
		return false;
	slice->page = atomic_long_fetch_add_relaxed(SLICE, &batch->taken);
	if (slice->page >= batch->nr_pages)
		return false;
	slice->end = min(slice->page + SLICE, batch->nr_pages);
	slice->item = &batch->items[copy_batch_find(batch, slice->page)];
	return true;
}

static void charge(struct copy_batch *batch, u64 ns)
{
#ifdef CONFIG_CGROUPS
	if (!batch->cgroup)
		return;
	__cgroup_account_cputime(batch->cgroup, ns);
	__cgroup_account_cputime_field(batch->cgroup, CPUTIME_SYSTEM, ns);
#endif
}

/* Returns how many pages have been copied. Not preempted while someone waits. */
static unsigned long help_once(struct copy_batch *batch)
{
	struct slice slice;
	u64 begin;

	guard(preempt)();
	begin = local_clock();
	if (!take_slice(batch, &slice))
		return 0;
	copy_slice(&slice);
	charge(batch, local_clock() - begin);
	finish_slice(&slice);
	return slice.end - slice.page;
}

/* Caches have no number: the first CPU that has this one's stands for it. */
static void trace_helper(unsigned long nr_pages)
{
	const int self = raw_smp_processor_id();
	int cpu;

	if (!trace_migrate_copy_helper_enabled())
		return;
	for_each_possible_cpu(cpu)
		if (cpus_share_cache(cpu, self))
			break;
	trace_migrate_copy_helper(self, cpu, nr_pages);
}

static void help(struct work_struct *work)
{
	struct copy_helper *helper = container_of(work, struct copy_helper, work);
	struct copy_batch *batch = helper->batch;
	unsigned long nr, sum = 0;

	while ((nr = help_once(batch))) {
		sum += nr;
		cond_resched();
	}
	trace_helper(sum);
	if (sum) {
		count_vm_event(MIGRATE_COPY_HELPERS);
		count_vm_events(MIGRATE_COPY_HELPERS_PAGES, sum);
	}
	copy_batch_put(batch);
}

static bool may_help(int cpu)
{
	return cpu_online(cpu) && workqueue_unbound_cpu(cpu) && idle_cpu(cpu) &&
	       !vcpu_is_preempted(cpu);
}

static bool shares_cache(const int *cpus, unsigned int nr, int cpu)
{
	while (nr--)
		if (cpus_share_cache(cpus[nr], cpu))
			return true;
	return false;
}

/*
 * Adds idle CPUs to @cpus, which has @nr, until there are @want, none of them with
 * a cache that one before has. Returns how many there are.
 */
static unsigned int add_idle_cpus(int *cpus, unsigned int nr, unsigned int want,
				  int self)
{
	unsigned int probes = NR_PROBES, looks = NR_LOOKS;
	int cpu;

	for_each_cpu_wrap(cpu, current->cpus_ptr, self) {
		if (nr == want || !probes || !looks--)
			break;
		if (cpu == self || shares_cache(cpus, nr, cpu))
			continue;
		probes--;
		if (may_help(cpu))
			cpus[nr++] = cpu;
	}
	return nr;
}

/* Those with a cache of their own, then one that has this CPU's. */
static unsigned int find_idle_cpus(int *cpus, unsigned int want)
{
	const int self = raw_smp_processor_id();
	unsigned int nr;

	cpus[0] = self;
	nr = add_idle_cpus(cpus, 1, want + 1, self) - 1;
	memmove(cpus, cpus + 1, nr * sizeof(*cpus));
	return nr < want ? add_idle_cpus(cpus, nr, want, self) : nr;
}

static unsigned int helpers_wanted(unsigned long nr_pages)
{
	const unsigned long shares = (nr_pages << PAGE_SHIFT) / SHARE;

	return min3(shares - 1, READ_ONCE(max_helpers), COPY_HELPERS_MAX);
}

/* Who is limited to some CPU time must not get more of it. */
static bool has_quota(void)
{
	guard(rcu)();
	return cfs_task_bw_constrained(current);
}

static void remember_cgroup(struct copy_batch *batch)
{
#ifdef CONFIG_CGROUPS
	struct cgroup *cgroup;

	guard(rcu)();
	cgroup = task_dfl_cgroup(current);
	/* The root's time is that of all CPUs. */
	if (cgroup_parent(cgroup) && cgroup_tryget(cgroup))
		batch->cgroup = cgroup;
#endif
}

static void queue_helpers(struct copy_batch *batch, unsigned int nr)
{
	unsigned int i;

	batch->nr_helpers = 0;
	for (i = 0; i < nr; i++) {
		struct copy_helper *helper = &batch->helpers[batch->nr_helpers];

		if (copy_should_fail(COPY_FAULT_HELPER))
			continue;
		batch->nr_helpers++;
		refcount_inc(&batch->users);
		helper->batch = batch;
		INIT_WORK(&helper->work, help);
		queue_work_on(batch->cpus[i], helpers_wq, &helper->work);
	}
}

static bool threads_prepare(struct copy_batch *batch, unsigned long nr_pages)
{
	const unsigned int want = helpers_wanted(nr_pages);

	if (has_quota()) {
		count_vm_event(MIGRATE_COPY_REFUSED_QUOTA);
		return false;
	}
	batch->nr_cpus = want ? find_idle_cpus(batch->cpus, want) : 0;
	if (!batch->nr_cpus)
		count_vm_event(MIGRATE_COPY_REFUSED_BUSY);
	return batch->nr_cpus;
}

static bool threads_start(struct copy_batch *batch)
{
	atomic_long_set(&batch->taken, 0);
	remember_cgroup(batch);
	queue_helpers(batch, min(batch->nr_cpus, helpers_wanted(batch->nr_pages)));
	return true;
}

static int threads_wait(struct copy_batch *batch, struct copy_item *item)
{
	struct slice slice;

	/* Pairs with the release in finish_slice(). */
	while (atomic_read_acquire(&item->left)) {
		if (take_slice(batch, &slice)) {
			copy_slice(&slice);
			finish_slice(&slice);
			cond_resched();
		} else {
			cpu_relax();
			cond_resched();
		}
	}
	return READ_ONCE(item->err);
}

/* Helpers that are still on their way need not come. */
static void threads_end(struct copy_batch *batch)
{
	unsigned int i;

	for (i = 0; i < batch->nr_helpers; i++)
		if (cancel_work(&batch->helpers[i].work))
			copy_batch_put(batch);
}

static int threads_enable(void)
{
	struct workqueue_attrs *attrs;
	int err = -ENOMEM;

	if (helpers_wq)
		return 0;
	attrs = alloc_workqueue_attrs();
	helpers_wq = alloc_workqueue("migrate_copy", WQ_UNBOUND, 0);
	if (attrs && helpers_wq) {
		attrs->affn_scope = WQ_AFFN_CACHE;
		err = apply_workqueue_attrs(helpers_wq, attrs);
	}
	if (err && helpers_wq) {
		destroy_workqueue(helpers_wq);
		helpers_wq = NULL;
	}
	free_workqueue_attrs(attrs);
	return err;
}

const struct copy_engine copy_threads_engine = {
	.name		= "threads",
	/* Two shares: one for who migrates. */
	.min_bytes	= 2 * SZ_256K,
	.folios_event	= MIGRATE_COPY_THREADS,
	.pages_event	= MIGRATE_COPY_THREADS_PAGES,
	.enable		= threads_enable,
	.prepare	= threads_prepare,
	.start		= threads_start,
	.wait		= threads_wait,
	.end		= threads_end,
};

static ssize_t max_helpers_show(struct kobject *kobj, struct kobj_attribute *attr,
				char *buf)
{
	return sysfs_emit(buf, "%u\n", READ_ONCE(max_helpers));
}

static ssize_t max_helpers_store(struct kobject *kobj, struct kobj_attribute *attr,
				 const char *buf, size_t count)
{
	unsigned int nr;
	int err = kstrtouint(buf, 0, &nr);

	if (err)
		return err;
	if (nr > COPY_HELPERS_MAX)
		return -EINVAL;
	WRITE_ONCE(max_helpers, nr);
	return count;
}

struct kobj_attribute copy_max_helpers_attr = __ATTR_RW(max_helpers);

#include "tests/migrate_copy_threads_kunit.h"
