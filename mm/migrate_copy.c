// SPDX-License-Identifier: GPL-2.0
/*
 * Copy the folios of a batch, while they are migrated.
 *
 * migrate_pages() unmaps 512 pages or so, flushes TLBs once for all of them, and
 * then moves folio by folio: copies it, has its mapping refer to the new one, and
 * maps that. Between the flush and the first move, the copies of all folios can
 * be begun: nobody can write to them any more. An engine does so with other CPUs,
 * or with a device. Folios are moved as before, in the same order, each as soon
 * as its own copy is there: no folio waits for one behind it.
 *
 * Invariants
 *
 * (1) A copy is begun only when no CPU can write to the source: it is locked,
 *     unmapped, flushed, and has no reference but those that are known. It stays
 *     locked until its copy has come to an end.
 * (2) A destination is nobody's but the engine's until then, and afterwards who
 *     migrates alone. Nothing refers to it before it is complete: mappings change
 *     when the folio is moved, as without an engine.
 * (3) A copy is used once. If the move fails with -EAGAIN, it is forgotten, and
 *     made again when the folio is tried again. It is not marked in the folio:
 *     what is not known to this batch has not been copied.
 * (4) Each folio that can not be copied here, for whatever reason, is copied by
 *     who migrates it, when it is moved.
 *
 * Who could write to a source after its copy has begun?
 *
 * - Through a page table: its entries have become migration entries, and no TLB
 *   has an old one, as try_to_unmap_flush() came first; or only one to read by, if
 *   that is put off (mm/migrate_defer.c). fork(), mremap() and
 *   mprotect() copy, move and change migration entries, faults wait for them, and
 *   munmap() and exit zap them: no entry becomes one that maps the source.
 * - GUP that had a pin before: it has a reference, and the folio is refused. GUP
 *   can get no new one, as it finds migration entries; gup_fast() drops the
 *   reference again when it sees that the entry has changed.
 * - By the page cache or the swap cache: whoever finds the folio there takes a
 *   reference, and the folio lock to change contents. write(), truncation and
 *   reclaim wait for that lock. A reader has no lock, but does not write.
 * - Drivers that keep their objects in shmem (TTM, i915, SGX): they write with a
 *   reference only, and may have dropped it when it is looked for. One folio at a
 *   time that race is as old as migration; here it would be longer. Their files
 *   are not mapped into processes, or ask for memory that is not movable (i915,
 *   etnaviv, omapdrm): such files are left alone.
 * - By a filesystem that has another way to its folios: buffer heads are locked
 *   one by one, and metadata are written through b_data with no reference to the
 *   folio; aio, NFS, btrfs, jfs and secretmem have callbacks of their own for
 *   ->migrate_folio(), with locks of their own around the copy. So only folios
 *   without private data are copied here, of mappings whose callback does
 *   nothing but migrate_folio() for them.
 * - A device: writeback and direct I/O hold references. Writeback reads, and is
 *   waited for before a folio is unmapped.
 * - KSM pages are never written. Split: needs the lock. Memory failure: takes the
 *   page away later; a copy that meets poison ends with -EHWPOISON. Hot-unplug
 *   is a migration itself.
 *
 * Whoever gets a reference while the folio is copied, and still has it when it is
 * to be moved, is seen then: by __migrate_folio(), and for folios that are in a
 * cache, or large, once more when the reference count is frozen.
 *
 * Memory
 *
 * Batches are allocated when an engine is switched on, and stay: there may be no
 * memory when memory is migrated. If all are in use, another one is refused.
 */
#define pr_fmt(fmt) "migrate_copy: " fmt

#include <linux/bitmap.h>
#include <linux/buffer_head.h>
#include <linux/cgroup.h>
#include <linux/fs.h>
#include <linux/init.h>
#include <linux/kobject.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/pagemap.h>
#include <linux/shmem_fs.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/sysfs.h>
#include <linux/vmstat.h>

#include <trace/events/migrate.h>

#include "internal.h"
#include "migrate_copy.h"

DEFINE_STATIC_KEY_TRUE(folio_copy_bulk);
DEFINE_STATIC_KEY_FALSE(migrate_copy_engine_on);

static const struct copy_engine * const engines[] = {
	&copy_threads_engine,
#ifdef CONFIG_MIGRATION_BATCH_COPY_DMA
	&copy_dma_engine,
#endif
};

static const struct copy_engine *engine;
/* Who waits for memory. Compaction and the like are in no hurry. */
static unsigned long reasons = BIT(MR_SYSCALL) | BIT(MR_MEMPOLICY_MBIND) |
			       BIT(MR_NUMA_MISPLACED) | BIT(MR_DEMOTION) |
			       BIT(MR_DAMON);
static DEFINE_MUTEX(engine_mutex);

static struct copy_batch *batches[NR_COPY_BATCHES];
static unsigned long batches_used;

static struct copy_batch *batch_get(void)
{
	unsigned int i;

	if (copy_should_fail(COPY_FAULT_BATCH))
		return NULL;
	for (i = 0; i < NR_COPY_BATCHES; i++)
		if (!test_bit(i, &batches_used) &&
		    !test_and_set_bit_lock(i, &batches_used)) {
			refcount_set(&batches[i]->users, 1);
			batches[i]->cgroup = NULL;
			return batches[i];
		}
	return NULL;
}

/**
 * copy_batch_put() - have one user less.
 * @batch: a batch
 *
 * Context: Any.
 */
void copy_batch_put(struct copy_batch *batch)
{
	if (!refcount_dec_and_test(&batch->users))
		return;
#ifdef CONFIG_CGROUPS
	if (batch->cgroup)
		cgroup_put(batch->cgroup);
#endif
	clear_bit_unlock(batch->nr, &batches_used);
}

static int alloc_batches(void)
{
	unsigned int i;

	lockdep_assert_held(&engine_mutex);
	for (i = 0; i < NR_COPY_BATCHES; i++) {
		if (batches[i])
			continue;
		batches[i] = kvzalloc_obj(*batches[i]);
		if (!batches[i])
			return -ENOMEM;
		batches[i]->nr = i;
	}
	return 0;
}

/* Is ->migrate_folio() migrate_folio() for a folio without private data? */
static bool moves_as_usual(const struct address_space *mapping)
{
	const typeof(mapping->a_ops->migrate_folio) move = mapping->a_ops->migrate_folio;

	if (move == migrate_folio || move == filemap_migrate_folio)
		return true;
	return IS_ENABLED(CONFIG_BUFFER_HEAD) && move == buffer_migrate_folio;
}

/* Does everybody who writes to a folio of it lock the folio? */
static bool locks_to_write(struct address_space *mapping)
{
	if (!mapping)
		return true;
	if (mapping_inaccessible(mapping) || !moves_as_usual(mapping))
		return false;
	/* Filesystems write to their metadata with no more than a reference. */
	if (mapping->host && S_ISBLK(mapping->host->i_mode))
		return false;
	if (!shmem_mapping(mapping))
		return true;
	/* Drivers that keep data there do not. */
	return mapping_mapped(mapping) && mapping_gfp_mask(mapping) & __GFP_MOVABLE;
}

/* Why a folio is not copied here, or 0. See (1) to (4). */
static int refusal(struct folio *dst, struct folio *src)
{
	if (page_has_movable_ops(&src->page) || folio_is_zone_device(src) ||
	    folio_is_zone_device(dst) || folio_order(dst) != folio_order(src))
		return MIGRATE_COPY_REFUSED_OTHER;
	if (folio_test_private(src) || folio_test_private_2(src))
		return MIGRATE_COPY_REFUSED_PRIVATE;
	if (!locks_to_write(folio_mapping(src)))
		return MIGRATE_COPY_REFUSED_MAPPING;
	/* A mapping that is there again would be expected, too. */
	if (folio_mapped(src) || folio_ref_count(src) != folio_expected_ref_count(src) + 1)
		return MIGRATE_COPY_REFUSED_REFS;
	return 0;
}

static void add_item(struct copy_batch *batch, struct folio *dst, struct folio *src)
{
	struct copy_item *item = &batch->items[batch->nr_items++];

	VM_WARN_ON_ONCE_FOLIO(!folio_test_locked(src) || folio_mapped(src) ||
			      folio_test_writeback(src), src);
	VM_WARN_ON_ONCE_FOLIO(!folio_test_locked(dst) || dst->mapping, dst);
	item->src = src;
	item->dst = dst;
	item->first = batch->nr_pages;
	item->err = 0;
	atomic_set(&item->left, folio_nr_pages(src));
	batch->nr_pages += folio_nr_pages(src);
}

static void fill_batch(struct copy_batch *batch, struct list_head *srcs,
		       struct list_head *dsts)
{
	struct folio *src, *dst = list_first_entry(dsts, struct folio, lru);

	batch->nr_items = 0;
	batch->nr_pages = 0;
	list_for_each_entry(src, srcs, lru) {
		const int event = refusal(dst, src);

		if (event)
			count_vm_event(event);
		else
			add_item(batch, dst, src);
		if (batch->nr_items == COPY_BATCH_FOLIOS)
			break;
		dst = list_next_entry(dst, lru);
	}
}

/* The item that has @page of the batch. */
unsigned int copy_batch_find(const struct copy_batch *batch, unsigned long page)
{
	unsigned int low = 0, high = batch->nr_items;

	while (high - low > 1) {
		const unsigned int mid = low + (high - low) / 2;

		if (batch->items[mid].first <= page)
			low = mid;
		else
			high = mid;
	}
	return low;
}

static unsigned long pages_of(struct list_head *folios)
{
	struct folio *folio;
	unsigned long nr = 0;

	list_for_each_entry(folio, folios, lru)
		nr += folio_nr_pages(folio);
	return nr;
}

/* Asks who would copy first: if it is nobody, folios need not be looked at. */
static bool start_batch(struct copy_batch *batch, struct list_head *srcs,
			struct list_head *dsts, unsigned long nr_pages)
{
	const struct copy_engine *e = batch->engine;

	if (e->prepare && !e->prepare(batch, nr_pages))
		return false;
	fill_batch(batch, srcs, dsts);
	if (batch->nr_pages < e->min_bytes >> PAGE_SHIFT) {
		/* What was refused has been counted. */
		if (batch->nr_items)
			count_vm_event(MIGRATE_COPY_REFUSED_SMALL);
		return false;
	}
	batch->collected = 0;
	batch->begin = ktime_get();
	return e->start(batch);
}

/*
 * @srcs and @dsts are lists of folios, in the same order, which stay the same but
 * for those that are waited for. They are locked, and @srcs unmapped and flushed.
 */
struct copy_batch *__copy_batch_begin(struct list_head *srcs, struct list_head *dsts,
				      enum migrate_reason reason)
{
	/* Pairs with the release in switch_engine(): it is ready. */
	const struct copy_engine *e = smp_load_acquire(&engine);
	struct copy_batch *batch;
	unsigned long nr_pages;

	if (!e || !(READ_ONCE(reasons) & BIT(reason)) || list_empty(srcs))
		return NULL;
	nr_pages = pages_of(srcs);
	if (nr_pages < e->min_bytes >> PAGE_SHIFT) {
		count_vm_event(MIGRATE_COPY_REFUSED_SMALL);
		return NULL;
	}
	batch = batch_get();
	if (!batch) {
		count_vm_event(MIGRATE_COPY_REFUSED_BUSY);
		return NULL;
	}
	batch->engine = e;
	batch->reason = reason;
	if (start_batch(batch, srcs, dsts, nr_pages))
		return batch;
	copy_batch_put(batch);
	return NULL;
}

static int count_copied(struct copy_batch *batch, struct copy_item *item, int err)
{
	switch (err) {
	case 0:
		count_vm_event(batch->engine->folios_event);
		count_vm_events(batch->engine->pages_event, folio_nr_pages(item->src));
		return 1;
	case -EHWPOISON:
		count_vm_event(MIGRATE_COPY_POISONED);
		return err;
	case -EBUSY:
		return err;
	default:
		count_vm_event(MIGRATE_COPY_FELLBACK);
		return 0;
	}
}

/**
 * copy_engine_check() - do without an engine from now on if it is of no use.
 * @e: the engine, of which its ->usable() is asked
 *
 * Until it is switched on again. Batches that have begun go on.
 *
 * Context: Process context. Takes engine_mutex if nobody has it: who is about to
 * switch engines may be waiting for memory that is migrated here.
 */
void copy_engine_check(const struct copy_engine *e)
{
	if (e->usable() || !mutex_trylock(&engine_mutex))
		return;
	/* It may have been switched off, and on again, since. */
	if (engine == e && !e->usable()) {
		WRITE_ONCE(engine, NULL);
		pr_warn("%s is switched off\n", e->name);
	}
	mutex_unlock(&engine_mutex);
}

int __copy_batch_wait(struct copy_batch *batch, struct folio *dst, struct folio *src)
{
	struct copy_item *item = &batch->items[batch->collected];
	int err;

	if (batch->collected == batch->nr_items || item->dst != dst)
		return 0;
	batch->collected++;
	err = batch->engine->wait(batch, item);
	if (!err && copy_should_fail(COPY_FAULT_FOLIO))
		err = -EIO;
	if (item == batch->items)
		batch->first = ktime_get();
	return count_copied(batch, item, err);
}

/* What the first folio waited for, and how long it took to move all of them. */
static void trace_batch(const struct copy_batch *batch)
{
	trace_migrate_copy_batch(batch->engine->name, batch->reason, batch->nr_items,
				 batch->nr_pages,
				 ktime_to_ns(ktime_sub(batch->first, batch->begin)),
				 ktime_to_ns(ktime_sub(ktime_get(), batch->begin)));
}

void __copy_batch_end(struct copy_batch *batch)
{
	VM_WARN_ON_ONCE(batch->collected != batch->nr_items);
	if (batch->engine->end)
		batch->engine->end(batch);
	if (trace_migrate_copy_batch_enabled())
		trace_batch(batch);
	copy_batch_put(batch);
}

static ssize_t engine_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	const struct copy_engine *e = READ_ONCE(engine);
	unsigned int i;
	int len = sysfs_emit(buf, e ? "off" : "[off]");

	for (i = 0; i < ARRAY_SIZE(engines); i++)
		len += sysfs_emit_at(buf, len, e == engines[i] ? " [%s]" : " %s",
				     engines[i]->name);
	return len + sysfs_emit_at(buf, len, "\n");
}

/* One that has given up is not in use, but has to be disabled. */
static void disable_others(const struct copy_engine *e)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(engines); i++)
		if (engines[i] != e && engines[i]->disable)
			engines[i]->disable();
}

static int switch_engine(const struct copy_engine *e)
{
	int err = 0;

	lockdep_assert_held(&engine_mutex);
	if (e)
		err = alloc_batches();
	if (e && !err && e->enable)
		err = e->enable();
	if (err)
		return err;
	/* Pairs with the acquire in __copy_batch_begin(). */
	smp_store_release(&engine, e);
	if (e)
		static_branch_enable(&migrate_copy_engine_on);
	else
		static_branch_disable(&migrate_copy_engine_on);
	disable_others(e);
	return 0;
}

/* Batches that have begun are copied to their end by the engine they have. */
static ssize_t engine_store(struct kobject *kobj, struct kobj_attribute *attr,
			    const char *buf, size_t count)
{
	const struct copy_engine *e = NULL;
	unsigned int i;
	int err;

	for (i = 0; i < ARRAY_SIZE(engines); i++)
		if (sysfs_streq(buf, engines[i]->name))
			e = engines[i];
	if (!e && !sysfs_streq(buf, "off"))
		return -EINVAL;
	mutex_lock(&engine_mutex);
	err = switch_engine(e);
	mutex_unlock(&engine_mutex);
	return err ?: count;
}

static struct kobj_attribute engine_attr = __ATTR_RW(engine);

static ssize_t reasons_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	const unsigned long mask = READ_ONCE(reasons);
	unsigned int i;
	int len = 0;

	for (i = 0; i < MR_NEVER; i++)
		len += sysfs_emit_at(buf, len, mask & BIT(i) ? "%s[%s]" : "%s%s",
				     i ? " " : "", migrate_reason_names[i]);
	return len + sysfs_emit_at(buf, len, "\n");
}

static int find_reason(const char *name)
{
	return match_string(migrate_reason_names, MR_NEVER, name);
}

/* Names with spaces or commas between them, or "all", or "none". */
static int parse_reasons(char *names, unsigned long *mask)
{
	char *name;
	int i;

	*mask = 0;
	names = strim(names);
	if (!strcmp(names, "none"))
		return 0;
	if (!strcmp(names, "all")) {
		*mask = BIT(MR_NEVER) - 1;
		return 0;
	}
	while ((name = strsep(&names, " ,\n\t"))) {
		if (!*name)
			continue;
		i = find_reason(name);
		if (i < 0)
			return -EINVAL;
		*mask |= BIT(i);
	}
	return *mask ? 0 : -EINVAL;
}

static ssize_t reasons_store(struct kobject *kobj, struct kobj_attribute *attr,
			     const char *buf, size_t count)
{
	char *names = kstrndup(buf, count, GFP_KERNEL);
	unsigned long mask;
	int err;

	if (!names)
		return -ENOMEM;
	err = parse_reasons(names, &mask);
	kfree(names);
	if (err)
		return err;
	WRITE_ONCE(reasons, mask);
	return count;
}

static struct kobj_attribute reasons_attr = __ATTR_RW(reasons);

static ssize_t bulk_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	const bool on = COPY_HIGHPAGES_AT_ONCE && static_key_enabled(&folio_copy_bulk);

	return sysfs_emit(buf, "%d\n", on);
}

static ssize_t bulk_store(struct kobject *kobj, struct kobj_attribute *attr,
			  const char *buf, size_t count)
{
	bool on;
	int err = kstrtobool(buf, &on);

	if (err)
		return err;
	if (on && !COPY_HIGHPAGES_AT_ONCE)
		return -EOPNOTSUPP;
	if (on)
		static_branch_enable(&folio_copy_bulk);
	else
		static_branch_disable(&folio_copy_bulk);
	return count;
}

static struct kobj_attribute bulk_attr = __ATTR_RW(bulk);

static struct attribute *migrate_copy_attrs[] = {
	&engine_attr.attr,
	&reasons_attr.attr,
	&bulk_attr.attr,
	&copy_max_helpers_attr.attr,
#ifdef CONFIG_MIGRATION_BATCH_COPY_DMA
	&copy_dma_timeout_attr.attr,
	&copy_dma_quarantined_attr.attr,
#endif
	NULL,
};
ATTRIBUTE_GROUPS(migrate_copy);

static int __init migrate_copy_sysfs_init(void)
{
	struct kobject *kobj = kobject_create_and_add("migrate_copy", mm_kobj);
	int err;

	if (!kobj)
		return -ENOMEM;
	err = sysfs_create_groups(kobj, migrate_copy_groups);
	if (err)
		kobject_put(kobj);
	return err;
}
subsys_initcall(migrate_copy_sysfs_init);

#include "tests/migrate_copy_kunit.h"
