/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The store for counts of migration entries, by itself: mm/migrate_entry_count.c
 * includes this.
 */
#ifdef CONFIG_MIGRATION_ENTRY_COUNT_KUNIT_TEST

#include <kunit/test.h>
#include <linux/kthread.h>
#include <linux/prandom.h>
#include <linux/sched/task.h>
#include <linux/sizes.h>

/* Small enough for pages to share slots */
#define ORDER		8
#define NR_PFNS		4096UL
#define PFN		0x12400UL
#define THP		512U
#define LARGE_ORDER	12

static void free_table(void *slots)
{
	kvfree(slots);
}

static struct migration_entry_table *make_table(struct kunit *test, unsigned int order)
{
	struct migration_entry_table *t = kunit_kzalloc(test, sizeof(*t), GFP_KERNEL);

	KUNIT_ASSERT_NOT_NULL(test, t);
	KUNIT_ASSERT_TRUE(test, table_alloc(t, order));
	KUNIT_ASSERT_EQ(test, kunit_add_action_or_reset(test, free_table, t->slots), 0);
	return t;
}

static bool is_empty(const struct migration_entry_table *t)
{
	unsigned long i;

	for (i = 0; i <= t->mask; i++)
		if (atomic_read(t->slots + i))
			return false;
	return true;
}

/* Runs of all lengths that begin and end anywhere in 16 pages. */
static void counts_runs(struct kunit *test)
{
	struct migration_entry_table *t = make_table(test, LARGE_ORDER);
	unsigned long pfn;
	unsigned int nr;

	for (pfn = PFN; pfn < PFN + 16; pfn++) {
		for (nr = 2; nr < 48; nr++) {
			migration_entry_table_add(t, pfn, nr);
			KUNIT_EXPECT_EQ(test, first_left(t, PFN, PFN + THP), pfn);
			KUNIT_EXPECT_EQ(test, first_left(t, pfn + nr, PFN + THP), PFN + THP);
			KUNIT_EXPECT_TRUE(test, migration_entry_table_sub(t, pfn, nr - 1));
			KUNIT_EXPECT_EQ(test, first_left(t, PFN, PFN + THP), pfn + nr - 1);
			KUNIT_EXPECT_TRUE(test, migration_entry_table_sub(t, pfn + nr - 1, 1));
			KUNIT_EXPECT_TRUE(test, is_empty(t));
		}
	}
}

/* Two pages of one slot: none is taken for free of entries while one has some. */
static void collision_is_not_zero(struct kunit *test)
{
	struct migration_entry_table *t = make_table(test, ORDER);
	const unsigned long other = PFN + (1UL << ORDER);

	KUNIT_EXPECT_PTR_EQ(test, migration_entry_slot(t, other), migration_entry_slot(t, PFN));
	migration_entry_table_add(t, PFN, 1);
	migration_entry_table_add(t, other, 1);
	migration_entry_table_add(t, other, 1);
	KUNIT_EXPECT_TRUE(test, migration_entry_table_sub(t, PFN, 1));
	KUNIT_EXPECT_EQ(test, first_left(t, PFN, PFN + 1), PFN);
	KUNIT_EXPECT_TRUE(test, migration_entry_table_sub(t, other, 1));
	KUNIT_EXPECT_EQ(test, first_left(t, other, other + 1), other);
	KUNIT_EXPECT_TRUE(test, migration_entry_table_sub(t, other, 1));
	KUNIT_EXPECT_EQ(test, first_left(t, other, other + 1), other + 1);
	KUNIT_EXPECT_TRUE(test, is_empty(t));
}

/* Whatever comes and goes, no page with an entry is passed over. */
static void never_misses(struct kunit *test)
{
	struct migration_entry_table *t = make_table(test, ORDER);
	unsigned int *count = kunit_kcalloc(test, NR_PFNS, sizeof(*count), GFP_KERNEL);
	struct rnd_state rnd;
	int i, missed = 0, uncounted = 0;

	KUNIT_ASSERT_NOT_NULL(test, count);
	prandom_seed_state(&rnd, 1);
	for (i = 0; i < 20000; i++) {
		const unsigned long pfn = prandom_u32_state(&rnd) % NR_PFNS;
		unsigned int nr = prandom_u32_state(&rnd) % 40 + 1, n = 0;

		/* No folio reaches over the end of the table. */
		nr = min_t(unsigned int, nr, 64 - pfn % 64);
		if (i & 1) {
			migration_entry_table_add(t, pfn, nr);
			while (n < nr)
				count[pfn + n++]++;
		} else {
			while (n < nr && count[pfn + n])
				count[pfn + n++]--;
			uncounted += n && !migration_entry_table_sub(t, pfn, n);
		}
		for (n = 0; n < nr && !count[pfn + n];)
			n++;
		missed += first_left(t, pfn, pfn + nr) > pfn + n;
	}
	for (i = 0; i < NR_PFNS; i++)
		while (count[i]--)
			uncounted += !migration_entry_table_sub(t, i, 1);

	KUNIT_EXPECT_EQ(test, missed, 0);
	KUNIT_EXPECT_EQ(test, uncounted, 0);
	KUNIT_EXPECT_TRUE(test, is_empty(t));
}

/* One subtraction too many is noticed, and so is one too many in a run. */
static void underflow_is_noticed(struct kunit *test)
{
	struct migration_entry_table *t = make_table(test, LARGE_ORDER);

	KUNIT_EXPECT_FALSE(test, migration_entry_table_sub(t, PFN, 1));
	migration_entry_table_add(t, PFN, 1);
	migration_entry_table_add(t, PFN, THP);
	KUNIT_EXPECT_TRUE(test, migration_entry_table_sub(t, PFN, THP));
	migration_entry_table_add(t, PFN, THP / 2);
	KUNIT_EXPECT_FALSE(test, migration_entry_table_sub(t, PFN, THP / 2 + 1));
}

/* As many as 16 bits cannot hold; and 31 bits that are full are not zero. */
static void counts_many(struct kunit *test)
{
	struct migration_entry_table *t = make_table(test, LARGE_ORDER);
	int i;

	for (i = 0; i <= SZ_64K; i++)
		migration_entry_table_add(t, PFN, 1);
	KUNIT_EXPECT_EQ(test, first_left(t, PFN, PFN + 1), PFN);
	for (i = 0; i < SZ_64K; i++)
		KUNIT_ASSERT_TRUE(test, migration_entry_table_sub(t, PFN, 1));
	KUNIT_EXPECT_EQ(test, first_left(t, PFN, PFN + 1), PFN);
	KUNIT_EXPECT_TRUE(test, migration_entry_table_sub(t, PFN, 1));
	KUNIT_EXPECT_TRUE(test, is_empty(t));

	atomic_set(migration_entry_slot(t, PFN), INT_MAX);
	KUNIT_EXPECT_TRUE(test, migration_entry_table_sub(t, PFN, 1));
	for (i = 0; i < 3; i++)
		migration_entry_table_add(t, PFN, 1);
	KUNIT_EXPECT_EQ(test, first_left(t, PFN, PFN + 1), PFN);
	KUNIT_EXPECT_FALSE(test, migration_entry_table_sub(t, PFN, 1));
}

/* A slot for 16 pages, and at least as many as a folio has pages. */
static void grows_with_memory(struct kunit *test)
{
	KUNIT_EXPECT_EQ(test, table_order(1), max(12, MAX_PAGE_ORDER));
	KUNIT_EXPECT_EQ(test, table_order(1UL << 17), max(13, MAX_PAGE_ORDER));
	KUNIT_EXPECT_EQ(test, table_order(1UL << 24), 20);
	KUNIT_EXPECT_EQ(test, table_order(ULONG_MAX), 22);
}

/* --- a PMD's entry is split while its pages are read ----------------------- */

#define NR_ROUNDS	5000

struct split_race {
	struct migration_entry_table *t;
	bool head_first;	/* the wrong way round */
	atomic_t go;		/* the round that is to be run */
	atomic_t done;		/* ... or has been */
	bool last_goes;		/* its last entry is about to go */
};

/* What __split_huge_pmd_locked() does, and who zaps the PTEs' entries then. */
static void split_and_zap(struct split_race *race)
{
	unsigned int i;

	if (race->head_first)
		migration_entry_table_sub(race->t, PFN, 1);
	migration_entry_table_add(race->t, PFN, THP);
	if (!race->head_first)
		migration_entry_table_sub(race->t, PFN, 1);

	for (i = 0; i < THP - 1; i++)
		migration_entry_table_sub(race->t, PFN + i, 1);
	WRITE_ONCE(race->last_goes, true);
	migration_entry_table_sub(race->t, PFN + THP - 1, 1);
}

static int splitter(void *arg)
{
	struct split_race *race = arg;
	int round = 0;

	while (!kthread_should_stop()) {
		if (atomic_read_acquire(&race->go) == round) {
			cond_resched();
			continue;
		}
		split_and_zap(race);
		atomic_set_release(&race->done, ++round);
	}
	return 0;
}

/* Returns whether all pages have been read as zero while one was not. */
static bool read_too_early(struct split_race *race, int round)
{
	unsigned long pfn = PFN;
	bool early;

	race->last_goes = false;
	migration_entry_table_add(race->t, PFN, 1);
	atomic_set_release(&race->go, round);
	while ((pfn = first_left(race->t, pfn, PFN + THP)) < PFN + THP)
		cond_resched();
	early = !READ_ONCE(race->last_goes);

	while (atomic_read_acquire(&race->done) != round)
		cond_resched();
	return early;
}

/* Stops when it has been seen, if it is to be seen. */
static int nr_read_too_early(struct kunit *test, bool head_first)
{
	const int max_rounds = head_first ? 20 * NR_ROUNDS : NR_ROUNDS;
	struct split_race race = {
		.t = make_table(test, LARGE_ORDER),
		.head_first = head_first,
	};
	struct task_struct *task;
	int round, early = 0;

	if (num_online_cpus() < 2)
		kunit_skip(test, "needs two CPUs");
	task = kthread_run(splitter, &race, "migration_entry_split");
	KUNIT_ASSERT_FALSE(test, IS_ERR(task));
	for (round = 1; round <= max_rounds && !(head_first && early); round++) {
		early += read_too_early(&race, round);
		cond_resched();
	}
	kthread_stop(task);
	KUNIT_EXPECT_TRUE(test, is_empty(race.t));
	return early;
}

static void split_is_not_read_too_early(struct kunit *test)
{
	KUNIT_EXPECT_EQ(test, nr_read_too_early(test, false), 0);
}

/* That the reader could see it: if not, the test before says nothing. */
static void wrong_split_is_read_too_early(struct kunit *test)
{
	if (!nr_read_too_early(test, true))
		kunit_skip(test, "not seen in %d rounds", 20 * NR_ROUNDS);
}

static struct kunit_case migrate_entry_count_cases[] = {
	KUNIT_CASE(counts_runs),
	KUNIT_CASE(collision_is_not_zero),
	KUNIT_CASE(never_misses),
	KUNIT_CASE(underflow_is_noticed),
	KUNIT_CASE(counts_many),
	KUNIT_CASE(grows_with_memory),
	KUNIT_CASE(split_is_not_read_too_early),
	KUNIT_CASE(wrong_split_is_read_too_early),
	{}
};

static struct kunit_suite migrate_entry_count_suite = {
	.name = "migrate_entry_count",
	.test_cases = migrate_entry_count_cases,
};

kunit_test_suite(migrate_entry_count_suite);

#endif /* CONFIG_MIGRATION_ENTRY_COUNT_KUNIT_TEST */
