/* SPDX-License-Identifier: GPL-2.0-only */
/* Rings, ages and cookies of hints, and bursts: mm/kmigrated.c includes this. */
#ifdef CONFIG_NUMA_BALANCING_ASYNC_KUNIT_TEST

#include <kunit/test.h>

static struct ring *new_ring(struct kunit *test, unsigned int first)
{
	struct ring *ring = kunit_kzalloc(test, sizeof(*ring), GFP_KERNEL);

	KUNIT_ASSERT_NOT_NULL(test, ring);
	ring->hints = kunit_kcalloc(test, RING_SLOTS, sizeof(struct hint), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, ring->hints);
	ring->head = first;
	ring->tail = first;
	return ring;
}

/* In order, as many as fit, also where the numbers wrap. */
static void ring_keeps_order(struct kunit *test)
{
	struct ring *ring = new_ring(test, -3U);
	struct hint hint = {};
	unsigned int round, i;

	for (round = 0; round < 3; round++) {
		for (i = 0; ring_has_room(ring); i++) {
			hint.pfn = round * 1000 + i;
			ring_push(ring, &hint);
		}
		KUNIT_EXPECT_EQ(test, i, ring_size);
		KUNIT_EXPECT_EQ(test, ring_len(ring), ring_size);
		for (i = 0; ring_pop(ring, &hint); i++)
			KUNIT_EXPECT_EQ(test, (u64)hint.pfn, round * 1000 + i);
		KUNIT_EXPECT_EQ(test, i, ring_size);
	}
}

static void hint_holds_its_fields(struct kunit *test)
{
	const struct hint hint = {
		.pfn = BIT_ULL(PFN_BITS) - 1,
		.mm = 1,
		.memory = BIT(OWNER_BITS) - 2,
	};

	KUNIT_EXPECT_EQ(test, sizeof(hint), 16);
	KUNIT_EXPECT_EQ(test, (u64)hint.pfn, BIT_ULL(PFN_BITS) - 1);
	KUNIT_EXPECT_EQ(test, (u64)hint.mm, 1);
	KUNIT_EXPECT_EQ(test, (u64)hint.memory, BIT(OWNER_BITS) - 2);
}

static const u64 times[] = {
	1000000, U32_MAX, U32_MAX + 1ULL, U32_MAX + 5ULL, (7ULL << 32) - 1, (7ULL << 32) + 2,
};

static void age_survives_32_bits(struct kunit *test)
{
	struct hint hint = {};
	int i, age;

	for (i = 0; i < ARRAY_SIZE(times); i++)
		for (age = 0; age < 1000; age += 7) {
			hint.when = lower_32_bits(times[i] - age);
			KUNIT_EXPECT_EQ(test, hint_time(&hint, times[i]), times[i] - age);
		}
}

static void old_hints_expire(struct kunit *test)
{
	struct hint hint = {};
	int i;

	for (i = 0; i < ARRAY_SIZE(times); i++) {
		/* A time that no void has come near to */
		const u64 now = times[i] + (1ULL << 40);

		hint.when = lower_32_bits(now - ttl);
		KUNIT_EXPECT_FALSE(test, hint_expired(&hint, now));
		KUNIT_EXPECT_TRUE(test, hint_expired(&hint, now + 1));
	}
}

/* A hint of the same moment may have been queued before: it is void, too. */
static void void_hints_expire(struct kunit *test)
{
	const u64 now = get_jiffies_64();
	struct hint hint = { .mm = 3, .memory = 4, .when = lower_32_bits(now) };

	voided[3] = now;
	voided[4] = 0;
	KUNIT_EXPECT_FALSE(test, hint_expired(&hint, now));
	voided[4] = now - 1;
	KUNIT_EXPECT_FALSE(test, hint_expired(&hint, now));
	voided[4] = now;
	KUNIT_EXPECT_TRUE(test, hint_expired(&hint, now));
	voided[4] = now + 1;
	KUNIT_EXPECT_TRUE(test, hint_expired(&hint, now));
	/* Real hints of that slot, if there are any, need not be used */
	voided[4] = 0;
	note_void(&voided[4]);
}

/* A void that comes late does not bring back what a later one has forbidden. */
static void voids_do_not_go_back(struct kunit *test)
{
	u64 when = get_jiffies_64() + 1000;
	const u64 later = when;

	note_void(&when);
	KUNIT_EXPECT_EQ(test, when, later);
	when = 0;
	note_void(&when);
	KUNIT_EXPECT_GE(test, get_jiffies_64(), when);
	KUNIT_EXPECT_GT(test, when, 0);
}

static void ring_lags_by_its_oldest(struct kunit *test)
{
	const unsigned int late = max(ttl / LAG_SHARE, 2 * hold);
	struct ring *ring = new_ring(test, 0);
	struct hint hint = { .when = 5 };

	KUNIT_EXPECT_FALSE(test, ring_lags(ring, 5 + 10 * late));
	ring_push(ring, &hint);
	hint.when = 5 + late;
	ring_push(ring, &hint);
	KUNIT_EXPECT_FALSE(test, ring_lags(ring, 5 + late));
	KUNIT_EXPECT_TRUE(test, ring_lags(ring, 5 + late + 1));
	ring_pop(ring, &hint);
	KUNIT_EXPECT_FALSE(test, ring_lags(ring, 5 + late + 1));
}

/* The first ones do not pay; all that follow do, and those of the next period. */
static void bursts_pay(struct kunit *test)
{
	struct burst burst = {};
	int i;

	for (i = 1; i < 100; i++)
		KUNIT_EXPECT_EQ(test, burst_pays(&burst, 1000, 4, 8), i >= 8);
	KUNIT_EXPECT_TRUE(test, burst_pays(&burst, 1004, 4, 8));
	KUNIT_EXPECT_TRUE(test, burst_pays(&burst, 1007, 4, 8));
	/* There were two */
	KUNIT_EXPECT_FALSE(test, burst_pays(&burst, 1008, 4, 8));
}

static void a_trickle_does_not_pay(struct kunit *test)
{
	struct burst burst = {};
	int i;

	for (i = 1; i < 100; i++)
		KUNIT_EXPECT_FALSE(test, burst_pays(&burst, 1000 + i, 4, 8));
	/* A burst that was long ago says nothing */
	for (i = 0; i < 100; i++)
		burst_pays(&burst, 5000, 4, 8);
	KUNIT_EXPECT_FALSE(test, burst_pays(&burst, 5008, 4, 8));
	/* One by one is never too few */
	KUNIT_EXPECT_TRUE(test, burst_pays(&burst, 9000, 4, 1));
}

static void cookie_tells_folios_apart(struct kunit *test)
{
	/* A large one's order is kept where its second page is */
	struct folio *folio = kunit_kcalloc(test, 4, sizeof(struct page), GFP_KERNEL);
	u32 cookie;

	KUNIT_ASSERT_NOT_NULL(test, folio);
	folio->mapping = (void *)0xffff888001234501;
	folio->index = 77;
	cookie = folio_cookie(folio);
	KUNIT_EXPECT_EQ(test, folio_cookie(folio), cookie);
	folio->index = 78;
	KUNIT_EXPECT_NE(test, folio_cookie(folio), cookie);
	folio->index = 77;
	folio->mapping = (void *)0xffff988001234501;
	KUNIT_EXPECT_NE(test, folio_cookie(folio), cookie);
	folio->mapping = (void *)0xffff888001234500;
	KUNIT_EXPECT_NE(test, folio_cookie(folio), cookie);
	folio->mapping = (void *)0xffff888001234501;
	KUNIT_EXPECT_EQ(test, folio_cookie(folio), cookie);
	/* It has been split, or was collapsed */
	__folio_set_head(folio);
	folio_set_order(folio, 2);
	KUNIT_EXPECT_NE(test, folio_cookie(folio), cookie);
}

static struct kunit_case kmigrated_cases[] = {
	KUNIT_CASE(ring_keeps_order),
	KUNIT_CASE(hint_holds_its_fields),
	KUNIT_CASE(age_survives_32_bits),
	KUNIT_CASE(old_hints_expire),
	KUNIT_CASE(void_hints_expire),
	KUNIT_CASE(voids_do_not_go_back),
	KUNIT_CASE(ring_lags_by_its_oldest),
	KUNIT_CASE(bursts_pay),
	KUNIT_CASE(a_trickle_does_not_pay),
	KUNIT_CASE(cookie_tells_folios_apart),
	{}
};

static struct kunit_suite kmigrated_suite = {
	.name = "kmigrated",
	.test_cases = kmigrated_cases,
};

kunit_test_suite(kmigrated_suite);

#endif /* CONFIG_NUMA_BALANCING_ASYNC_KUNIT_TEST */
