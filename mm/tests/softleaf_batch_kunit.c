// SPDX-License-Identifier: GPL-2.0-only
/*
 * Entries in a row that differ in their offset only are made from the first,
 * and found again as a batch.
 */
#include <kunit/test.h>
#include <linux/leafops.h>
#include <linux/mm.h>

#include "../internal.h"

#define NR	16
#define PFN	0x12340UL

struct kind {
	const char *name;
	bool writable, exclusive, young, dirty, soft_dirty, uffd;
};

static const struct kind kinds[] = {
	{ .name = "read" },
	{ .name = "read exclusive", .exclusive = true },
	{ .name = "write", .writable = true },
	{ .name = "write young dirty", .writable = true, .young = true, .dirty = true },
	{ .name = "read soft-dirty", .soft_dirty = true },
	{ .name = "read exclusive uffd", .exclusive = true, .uffd = true },
	{ .name = "read dirty soft-dirty uffd", .dirty = true, .soft_dirty = true, .uffd = true },
};

KUNIT_ARRAY_PARAM_DESC(kinds, kinds, name);

static pte_t make_pte(const struct kind *kind, unsigned long pfn)
{
	softleaf_t entry;
	pte_t pte;

	if (kind->writable)
		entry = make_writable_migration_entry(pfn);
	else if (kind->exclusive)
		entry = make_readable_exclusive_migration_entry(pfn);
	else
		entry = make_readable_migration_entry(pfn);
	if (kind->young)
		entry = make_migration_entry_young(entry);
	if (kind->dirty)
		entry = make_migration_entry_dirty(entry);

	pte = softleaf_to_pte(entry);
	if (kind->soft_dirty)
		pte = pte_swp_mksoft_dirty(pte);
	if (kind->uffd)
		pte = pte_swp_mkuffd(pte);
	return pte;
}

static pte_t *make_ptes(struct kunit *test, pte_t first)
{
	pte_t *ptes = kunit_kcalloc(test, NR, sizeof(*ptes), GFP_KERNEL);

	KUNIT_ASSERT_NOT_NULL(test, ptes);
	set_softleaf_ptes(&init_mm, 0, ptes, first, NR);
	return ptes;
}

/* Each entry is what it would be if it were made for its page alone. */
static void set_is_one_by_one(struct kunit *test)
{
	const struct kind *kind = test->param_value;
	pte_t *ptes = make_ptes(test, make_pte(kind, PFN));
	int i;

	for (i = 0; i < NR; i++)
		KUNIT_EXPECT_TRUE_MSG(test, pte_same(ptes[i], make_pte(kind, PFN + i)),
				      "entry %d", i);
}

static void set_writes_no_more(struct kunit *test)
{
	const struct kind *kind = test->param_value;
	pte_t *ptes = kunit_kcalloc(test, NR, sizeof(*ptes), GFP_KERNEL);
	pte_t none;

	KUNIT_ASSERT_NOT_NULL(test, ptes);
	none = ptes[NR - 1];
	set_softleaf_ptes(&init_mm, 0, ptes, make_pte(kind, PFN), NR - 1);
	KUNIT_EXPECT_TRUE(test, pte_same(ptes[NR - 1], none));
}

static void batch_is_all(struct kunit *test)
{
	const struct kind *kind = test->param_value;
	pte_t *ptes = make_ptes(test, make_pte(kind, PFN));

	KUNIT_EXPECT_EQ(test, softleaf_pte_batch(ptes, NR, ptes[0]), NR);
	KUNIT_EXPECT_EQ(test, softleaf_pte_batch(ptes + 3, NR - 3, ptes[3]), NR - 3);
	KUNIT_EXPECT_EQ(test, softleaf_pte_batch(ptes, 5, ptes[0]), 5);
	KUNIT_EXPECT_EQ(test, softleaf_pte_batch(ptes, 1, ptes[0]), 1);
}

/* Whatever else is in a row's place, the row ends there. */
static void batch_ends(struct kunit *test)
{
	const struct kind *kind = test->param_value;
	const pte_t first = make_pte(kind, PFN);
	pte_t *ptes = make_ptes(test, first);
	int i, at;

	for (at = 1; at < NR; at++) {
		const pte_t right = ptes[at];

		ptes[at] = make_pte(kind, PFN + at + 1);
		KUNIT_EXPECT_EQ(test, softleaf_pte_batch(ptes, NR, first), at);
		ptes[at] = make_pte(kind, PFN + at - 1);
		KUNIT_EXPECT_EQ(test, softleaf_pte_batch(ptes, NR, first), at);

		for (i = 0; i < ARRAY_SIZE(kinds); i++) {
			ptes[at] = make_pte(&kinds[i], PFN + at);
			KUNIT_EXPECT_EQ(test, softleaf_pte_batch(ptes, NR, first),
					pte_same(ptes[at], right) ? NR : at);
		}
		ptes[at] = right;
	}
}

static void batch_of_swap_entries(struct kunit *test)
{
	const pte_t first = pte_swp_mkexclusive(swp_entry_to_pte(swp_entry(1, PFN)));
	pte_t *ptes = make_ptes(test, first);

	KUNIT_EXPECT_TRUE(test, pte_swp_exclusive(ptes[NR - 1]));
	KUNIT_EXPECT_EQ(test, swap_pte_batch(ptes, NR, first), NR);
	ptes[7] = pte_swp_clear_exclusive(ptes[7]);
	KUNIT_EXPECT_EQ(test, swap_pte_batch(ptes, NR, first), 7);
}

static struct kunit_case softleaf_batch_test_cases[] = {
	KUNIT_CASE_PARAM(set_is_one_by_one, kinds_gen_params),
	KUNIT_CASE_PARAM(set_writes_no_more, kinds_gen_params),
	KUNIT_CASE_PARAM(batch_is_all, kinds_gen_params),
	KUNIT_CASE_PARAM(batch_ends, kinds_gen_params),
	KUNIT_CASE(batch_of_swap_entries),
	{}
};

static struct kunit_suite softleaf_batch_test_suite = {
	.name = "softleaf_batch",
	.test_cases = softleaf_batch_test_cases,
};

kunit_test_suite(softleaf_batch_test_suite);
