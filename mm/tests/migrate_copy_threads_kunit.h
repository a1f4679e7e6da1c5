/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Batches of folios of all sizes, copied in slices: mm/migrate_copy_threads.c
 * includes this.
 */
#ifdef CONFIG_MIGRATION_BATCH_COPY_KUNIT_TEST

#include <kunit/test.h>
#include <linux/completion.h>
#include <linux/prandom.h>
#include <linux/slab.h>

/* 13 is odd and does not divide a slice: folios begin and end anywhere in it. */
static const unsigned int some_orders[] = { 0, 1, 0, 3, 0, 0, 5, 2, 0, 6, 4, 1, 0 };

struct mix {
	struct copy_batch *batch;
	struct rnd_state rnd;
};

static void free_mix(void *arg)
{
	struct mix *mix = arg;
	unsigned int i;

	for (i = 0; i < mix->batch->nr_items; i++) {
		folio_put(mix->batch->items[i].src);
		folio_put(mix->batch->items[i].dst);
	}
	kvfree(mix->batch);
}

static u64 word_of(unsigned long page, unsigned int at)
{
	return (page + 1) * 0x9e3779b97f4a7c15ULL + at;
}

static void fill(struct folio *folio, unsigned long first)
{
	unsigned long i;
	unsigned int at;

	for (i = 0; i < folio_nr_pages(folio); i++) {
		u64 *word = kmap_local_folio(folio, i * PAGE_SIZE);

		for (at = 0; at < PAGE_SIZE / sizeof(u64); at++)
			word[at] = word_of(first + i, at);
		kunmap_local(word);
	}
}

static bool is_filled(struct folio *folio, unsigned long first)
{
	unsigned long i;
	unsigned int at, wrong = 0;

	for (i = 0; i < folio_nr_pages(folio); i++) {
		u64 *word = kmap_local_folio(folio, i * PAGE_SIZE);

		for (at = 0; at < PAGE_SIZE / sizeof(u64); at++)
			wrong += word[at] != word_of(first + i, at);
		kunmap_local(word);
	}
	return !wrong;
}

static bool add_folio(struct copy_batch *batch, unsigned int order)
{
	const gfp_t gfp = GFP_KERNEL | __GFP_COMP | __GFP_ZERO;
	struct copy_item *item = &batch->items[batch->nr_items];

	item->src = folio_alloc(gfp, order);
	item->dst = folio_alloc(gfp, order);
	if (!item->src || !item->dst)
		return false;
	item->first = batch->nr_pages;
	item->err = 0;
	atomic_set(&item->left, 1 << order);
	fill(item->src, item->first);
	batch->nr_items++;
	batch->nr_pages += 1UL << order;
	return true;
}

static struct mix *make_mix(struct kunit *test, const unsigned int *orders, unsigned int nr)
{
	struct mix *mix = kunit_kzalloc(test, sizeof(*mix), GFP_KERNEL);
	unsigned int i;

	KUNIT_ASSERT_NOT_NULL(test, mix);
	mix->batch = kvzalloc_obj(*mix->batch);
	KUNIT_ASSERT_NOT_NULL(test, mix->batch);
	KUNIT_ASSERT_EQ(test, kunit_add_action_or_reset(test, free_mix, mix), 0);
	for (i = 0; i < nr; i++)
		KUNIT_ASSERT_TRUE(test, add_folio(mix->batch, orders[i]));
	return mix;
}

static void expect_copied(struct kunit *test, const struct copy_batch *batch)
{
	unsigned int i;

	for (i = 0; i < batch->nr_items; i++) {
		const struct copy_item *item = &batch->items[i];

		KUNIT_EXPECT_EQ(test, atomic_read(&item->left), 0);
		KUNIT_EXPECT_EQ(test, item->err, 0);
		KUNIT_EXPECT_TRUE_MSG(test, is_filled(item->dst, item->first),
				      "folio %u", i);
	}
}

/* Each page belongs to one slice; a folio is there when its last slice is. */
static void slices_make_the_whole(struct kunit *test)
{
	struct mix *mix = make_mix(test, some_orders, ARRAY_SIZE(some_orders));
	struct copy_batch *batch = mix->batch;
	unsigned long done = 0;
	struct slice slice;
	unsigned int i;

	while (take_slice(batch, &slice)) {
		KUNIT_EXPECT_EQ(test, slice.page, done);
		KUNIT_EXPECT_GT(test, slice.end, slice.page);
		copy_slice(&slice);
		finish_slice(&slice);
		done = slice.end;
		for (i = 0; i < batch->nr_items; i++) {
			struct copy_item *item = &batch->items[i];
			const unsigned long nr = folio_nr_pages(item->src);
			const unsigned long in = done <= item->first ? 0 :
						 min(done - item->first, nr);

			KUNIT_EXPECT_EQ(test, atomic_read(&item->left), nr - in);
		}
	}
	KUNIT_EXPECT_EQ(test, done, batch->nr_pages);
	KUNIT_EXPECT_FALSE(test, take_slice(batch, &slice));
	expect_copied(test, batch);
}

static void page_belongs_to_its_folio(struct kunit *test)
{
	struct mix *mix = make_mix(test, some_orders, ARRAY_SIZE(some_orders));
	const struct copy_batch *batch = mix->batch;
	unsigned long page;

	for (page = 0; page < batch->nr_pages; page++) {
		const struct copy_item *item = &batch->items[copy_batch_find(batch, page)];

		KUNIT_EXPECT_LE(test, item->first, page);
		KUNIT_EXPECT_LT(test, page, item->first + folio_nr_pages(item->src));
	}
}

/* Slices that are copied in any order, and finished in another one. */
static void order_does_not_matter(struct kunit *test)
{
	struct mix *mix = make_mix(test, some_orders, ARRAY_SIZE(some_orders));
	const unsigned int most = DIV_ROUND_UP(mix->batch->nr_pages, SLICE);
	struct slice *slices = kunit_kcalloc(test, most, sizeof(*slices), GFP_KERNEL);
	unsigned int nr = 0, i;

	KUNIT_ASSERT_NOT_NULL(test, slices);
	while (nr < most && take_slice(mix->batch, &slices[nr]))
		nr++;
	KUNIT_ASSERT_GE(test, nr * SLICE, mix->batch->nr_pages);
	for (i = nr; i--;)
		copy_slice(&slices[i]);
	for (i = 0; i < nr; i++)
		finish_slice(&slices[i]);
	expect_copied(test, mix->batch);
}

/* Helpers on all CPUs against one who waits, as in a migration. */
static void helpers_and_waiter_share(struct kunit *test)
{
	unsigned int i, round;
	int cpu;

	KUNIT_ASSERT_EQ(test, threads_enable(), 0);
	for (round = 0; round < 50; round++) {
		struct mix *mix = make_mix(test, some_orders, ARRAY_SIZE(some_orders));
		struct copy_batch *batch = mix->batch;
		unsigned int nr = 0;

		for_each_online_cpu(cpu)
			if (nr < COPY_HELPERS_MAX)
				batch->cpus[nr++] = cpu;
		refcount_set(&batch->users, 2);
		queue_helpers(batch, nr);
		for (i = 0; i < batch->nr_items; i++) {
			KUNIT_EXPECT_EQ(test, threads_wait(batch, &batch->items[i]), 0);
			KUNIT_EXPECT_TRUE(test, is_filled(batch->items[i].dst,
							  batch->items[i].first));
		}
		threads_end(batch);
		flush_workqueue(helpers_wq);
		/* Each helper came, or was cancelled. */
		KUNIT_EXPECT_EQ(test, refcount_read(&batch->users), 2);
		kunit_release_action(test, free_mix, mix);
	}
}

/* The time of a wake-up must be worth it. */
static void as_many_as_pay(struct kunit *test)
{
	const unsigned int max = max_helpers;

	KUNIT_EXPECT_EQ(test, helpers_wanted(2 * SHARE >> PAGE_SHIFT), min(1, max));
	KUNIT_EXPECT_EQ(test, helpers_wanted(3 * SHARE >> PAGE_SHIFT), min(2, max));
	KUNIT_EXPECT_EQ(test, helpers_wanted(1000 * SHARE >> PAGE_SHIFT),
			min(COPY_HELPERS_MAX, max));
}

static struct kunit_case migrate_copy_threads_cases[] = {
	KUNIT_CASE(slices_make_the_whole),
	KUNIT_CASE(page_belongs_to_its_folio),
	KUNIT_CASE(order_does_not_matter),
	KUNIT_CASE(helpers_and_waiter_share),
	KUNIT_CASE(as_many_as_pay),
	{}
};

static struct kunit_suite migrate_copy_threads_suite = {
	.name = "migrate_copy_threads",
	.test_cases = migrate_copy_threads_cases,
};

kunit_test_suite(migrate_copy_threads_suite);

#endif /* CONFIG_MIGRATION_BATCH_COPY_KUNIT_TEST */
