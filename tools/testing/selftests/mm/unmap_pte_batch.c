// SPDX-License-Identifier: GPL-2.0
/*
 * The PTEs of a large folio are replaced by swap entries, or cleared, or mapped
 * again after a split, a run at a time. Whatever differs between its pages has
 * to survive that: contents, soft-dirty, userfaultfd's write protection,
 * exclusivity.
 *
 * Folios are swapped out and in, freed after MADV_FREE, or split.
 *
 * The lab's mutants that a test kills are named above it (lab_mutant=N):
 * 31: a run may have pages that are soft-dirty and others that are not
 * 33: only the first page of a run is marked shared
 * 38: after a split, runs begin with the first page of a folio, always
 * 39: of a run, all are soft-dirty if a page is dirty
 * 40: after a split, any page passes for one full of zeroes
 */
#define _GNU_SOURCE
#include <sys/stat.h>
#include <sys/swap.h>

#include "pte_batch.h"

#define CGROUP		"/sys/fs/cgroup/"
#define OUR_CGROUP	CGROUP "unmap_pte_batch/"
#define ZRAM		"/sys/block/zram0/"

/* --- swap ----------------------------------------------------------------- */

FIXTURE(swap_out) {
	struct area a;
	const char *no_swap;
};

FIXTURE_VARIANT(swap_out) {
	size_t kb;
};

FIXTURE_VARIANT_ADD(swap_out, 16k) { .kb = 16 };
FIXTURE_VARIANT_ADD(swap_out, 64k) { .kb = 64 };
FIXTURE_VARIANT_ADD(swap_out, pmd) { .kb = 0 };

/* Swap to /dev/zram0, which nobody uses. Returns why that cannot be, or NULL. */
static const char *start_swap(void)
{
	const size_t size = 64 * SZ_1M;
	const uint32_t header[] = { 1, size / psize() - 1, 0 };
	char num[32], *page;
	bool ok = false;
	int fd;

	if (access(OUR_CGROUP "memory.reclaim", W_OK))
		return "no control group to reclaim";
	snprintf(num, sizeof(num), "%zu", size);
	page = calloc(1, psize());
	fd = open("/dev/zram0", O_RDWR);
	if (page && fd >= 0 && write_str(ZRAM "disksize", num)) {
		memcpy(page + 1024, header, sizeof(header));
		memcpy(page + psize() - 10, "SWAPSPACE2", 10);
		ok = pwrite(fd, page, psize(), 0) == (ssize_t)psize() &&
		     fsync(fd) == 0 && swapon("/dev/zram0", 0) == 0;
	}
	if (fd >= 0)
		close(fd);
	free(page);
	return ok ? NULL : "no /dev/zram0 to swap to";
}

FIXTURE_SETUP(swap_out)
{
	const char *why = area_setup(&self->a, variant->kb, OP_MBIND);

	if (why)
		SKIP(return, "%s", why);
	/* What is charged to a group of its own can be reclaimed alone */
	write_str(CGROUP "cgroup.subtree_control", "+memory");
	mkdir(OUR_CGROUP, 0700);
	write_str(OUR_CGROUP "cgroup.procs", "0");
	self->no_swap = start_swap();
	if (self->no_swap)
		SKIP(return, "%s", self->no_swap);
	ASSERT_TRUE(populate_by_ptes(&self->a));
}

FIXTURE_TEARDOWN(swap_out)
{
	area_teardown(&self->a);
	if (!self->no_swap && swapoff("/dev/zram0"))
		TH_LOG("swapoff failed");
	write_str(ZRAM "reset", "1");
	write_str(CGROUP "cgroup.procs", "0");
	rmdir(OUR_CGROUP);
}

/* All of the group, with what children have. Reclaim gives up now and then. */
static bool reclaim_all(struct area *a)
{
	for (int i = 0; i < 50; i++) {
		write_str(OUR_CGROUP "memory.reclaim", "8M");
		if (page_without(a, PM_PRESENT | PM_SWAP, PM_SWAP) == -1)
			return true;
	}
	return false;
}

/* Two ways to count; what is read first is there when it is counted. */
static bool swap_is_counted(void)
{
	long entries, in_smaps;

	for (int i = 0; i < 3; i++) {
		entries = read_named("/proc/self/status", "VmSwap");
		in_smaps = read_named("/proc/self/smaps_rollup", "Swap");
	}
	return entries == in_smaps;
}

/* Each folio goes in one piece. */
static void swap_all_out(struct __test_metadata *_metadata, struct area *a)
{
	const unsigned long swpout = folio_stat(a->size, "swpout");

	ASSERT_TRUE(reclaim_all(a));
	EXPECT_EQ(folio_stat(a->size, "swpout") - swpout, a->nr_folios);
	EXPECT_EQ(folio_stat(a->size, "split"), a->before.split);
	EXPECT_TRUE(swap_is_counted());
	EXPECT_GE(read_named("/proc/self/status", "VmSwap"), a->len / 1024);
}

static void swap_and_compare(struct __test_metadata *_metadata, struct area *a)
{
	const uint64_t kept = PM_SOFT_DIRTY | PM_UFFD_WP;

	ASSERT_TRUE(read_pagemap(a, a->saved));
	swap_all_out(_metadata, a);
	EXPECT_EQ(changed_page(a, kept), -1);
	EXPECT_EQ(bad_page(a), -1);
	EXPECT_EQ(changed_page(a, kept | PM_PRESENT), -1);
}

/* Kills mutant 39. */
TEST_F(swap_out, soft_dirty)
{
	ASSERT_TRUE(mix_soft_dirty(&self->a));
	swap_and_compare(_metadata, &self->a);
}

/* Kills mutant 31. */
TEST_F(swap_out, soft_dirty_read_only)
{
	ASSERT_TRUE(mix_soft_dirty(&self->a));
	ASSERT_TRUE(protect_all(&self->a));
	ASSERT_TRUE(has_in_runs(&self->a, PM_SOFT_DIRTY));
	swap_and_compare(_metadata, &self->a);
}

TEST_F(swap_out, uffd_wp)
{
	if (!mix_uffd_wp(&self->a))
		SKIP(return, "no asynchronous write protection");
	swap_and_compare(_metadata, &self->a);
}

/*
 * What the child has as well is copied on write, after swapping, too. The PTEs
 * do not tell which pages these are.
 */
TEST_F(swap_out, exclusive)
{
	struct area *a = &self->a;
	struct child child;

	child = mix_exclusive(a, NULL);
	ASSERT_TRUE(child_is_ready(&child));
	ASSERT_EQ(mprotect(a->mem, a->len, PROT_READ), 0);
	ASSERT_TRUE(reclaim_all(a));
	EXPECT_EQ(bad_page(a), -1);
	ASSERT_EQ(mprotect(a->mem, a->len, PROT_READ | PROT_WRITE), 0);
	for (size_t i = 0; i < a->nr; i++)
		write_page(a, i);
	EXPECT_EQ(bad_page(a), -1);
	EXPECT_TRUE(end_child(&child));
}

static bool lock_what_is_there(void *arg)
{
	return mlockall(MCL_CURRENT | MCL_ONFAULT) == 0;
}

static int nr_swapped(struct area *a)
{
	int n = 0;

	if (!read_pagemap(a, a->now))
		return -1;
	for (size_t i = 0; i < a->nr; i++)
		n += !!(a->now[i] & PM_SWAP);
	return n;
}

/*
 * What the child has locked stops it, when the parent's PTEs are replaced: the
 * folio stays in the swap cache. No page of it may be marked exclusive when its
 * entry is found: that is a BUG. Kills mutant 33.
 */
TEST_F(swap_out, cached)
{
	struct area *a = &self->a;
	struct child child;

	child = mix_exclusive(a, lock_what_is_there);
	ASSERT_TRUE(child_is_ready(&child));
	for (int i = 0; i < 50 && nr_swapped(a) < a->nr / a->nr_folios; i++)
		write_str(OUR_CGROUP "memory.reclaim", "8M");
	ASSERT_GE(nr_swapped(a), a->nr / a->nr_folios);
	EXPECT_EQ(bad_page(a), -1);
	for (size_t i = 0; i < a->nr; i++)
		write_page(a, i);
	EXPECT_EQ(bad_page(a), -1);
	EXPECT_TRUE(end_child(&child));
}

/* --- lazyfree ------------------------------------------------------------- */

FIXTURE(lazyfree) {
	struct area a;
};

FIXTURE_VARIANT(lazyfree) {
	size_t kb;
};

FIXTURE_VARIANT_ADD(lazyfree, 64k) { .kb = 64 };
FIXTURE_VARIANT_ADD(lazyfree, pmd) { .kb = 0 };

FIXTURE_SETUP(lazyfree)
{
	const char *why = area_setup(&self->a, variant->kb, OP_MBIND);

	if (why)
		SKIP(return, "%s", why);
	ASSERT_TRUE(populate(&self->a));
}

FIXTURE_TEARDOWN(lazyfree)
{
	area_teardown(&self->a);
}

static bool page_out(struct area *a)
{
	return madvise(a->mem, a->len, MADV_PAGEOUT) == 0;
}

/* Freed whole, and nothing is queued to be split. */
TEST_F(lazyfree, freed)
{
	struct area *a = &self->a;

	ASSERT_EQ(madvise(a->mem, a->len, MADV_FREE), 0);
	ASSERT_TRUE(page_out(a));
	EXPECT_EQ(page_without(a, PM_PRESENT | PM_SWAP, 0), -1);
	EXPECT_EQ(folio_stat(a->size, "nr_anon"), a->before.nr_anon);
	EXPECT_EQ(folio_stat(a->size, "split"), a->before.split);
	EXPECT_EQ(folio_stat(a->size, "split_deferred"),
		  a->before.split_deferred);
	memset(a->want, 0, a->nr * sizeof(*a->want));
	EXPECT_EQ(bad_page(a), -1);
}

/* Written to again, a folio stays, and a PMD stays a PMD. */
TEST_F(lazyfree, redirtied)
{
	struct area *a = &self->a;
	long huge;

	ASSERT_EQ(madvise(a->mem, a->len, MADV_FREE), 0);
	for (int i = 0; i < a->nr_folios; i++)
		write_page(a, i * folio_pages(a) + folio_pages(a) / 2);
	huge = read_named("/proc/self/smaps_rollup", "AnonHugePages");
	ASSERT_TRUE(read_pagemap(a, a->saved));
	ASSERT_TRUE(page_out(a));
	expect_same(_metadata, a, PM_PRESENT | PM_SWAP | PM_SOFT_DIRTY);
	EXPECT_EQ(read_named("/proc/self/smaps_rollup", "AnonHugePages"), huge);
}

/* A pinned folio stays, even if nobody wrote to it, and the others go. */
TEST_F(lazyfree, pinned)
{
	struct area *a = &self->a;
	int fd;

	fd = pin(page_of(a, folio_pages(a) / 2), psize(), 0);
	if (fd < 0)
		SKIP(return, "no /sys/kernel/debug/gup_test to pin a page with");
	ASSERT_EQ(madvise(a->mem, a->len, MADV_FREE), 0);
	ASSERT_TRUE(page_out(a));
	memset(a->want + folio_pages(a), 0,
	       (a->nr - folio_pages(a)) * sizeof(*a->want));
	EXPECT_EQ(page_without(a, PM_PRESENT, PM_PRESENT), folio_pages(a));
	EXPECT_EQ(folio_stat(a->size, "nr_anon"), a->before.nr_anon + 1);
	EXPECT_EQ(bad_page(a), -1);
	close(fd);
}

/*
 * Of a folio that is split because of a poisoned page the others are freed, as
 * all folios are; the page stays poisoned.
 */
TEST_F(lazyfree, poisoned)
{
	struct area *a = &self->a;
	const size_t bad = folio_pages(a) / 2;
	unsigned long pfn = pagemap_get_pfn(a->pagemap, page_of(a, bad));
	int err;

	ASSERT_EQ(madvise(a->mem, a->len, MADV_FREE), 0);
	err = poison(a, bad);
	if (err == EINVAL)
		SKIP(return, "no MADV_HWPOISON");
	ASSERT_EQ(err, 0);
	ASSERT_TRUE(page_out(a));
	ASSERT_TRUE(read_pagemap(a, a->now));
	for (size_t i = 0; i < a->nr; i++)
		EXPECT_EQ(a->now[i] & (PM_PRESENT | PM_SWAP),
			  i == bad ? PM_SWAP : 0);
	EXPECT_TRUE(is_poisoned(a, bad));
	memset(a->want, 0, a->nr * sizeof(*a->want));
	ASSERT_EQ(madvise(page_of(a, bad), psize(), MADV_DONTNEED), 0);
	EXPECT_EQ(bad_page(a), -1);
	if (unpoison_memory(pfn))
		TH_LOG("page 0x%lx stays poisoned", pfn);
}

/* --- split ---------------------------------------------------------------- */

FIXTURE(split_thp) {
	struct area a;
};

FIXTURE_VARIANT(split_thp) {
	int order;
};

FIXTURE_VARIANT_ADD(split_thp, pages) { .order = 0 };
FIXTURE_VARIANT_ADD(split_thp, order_4) { .order = 4 };

FIXTURE_SETUP(split_thp)
{
	const char *why = area_setup(&self->a, 0, OP_MBIND);

	if (why)
		SKIP(return, "%s", why);
}

FIXTURE_TEARDOWN(split_thp)
{
	area_teardown(&self->a);
}

static bool split_to(struct area *a, int order)
{
	char cmd[96];

	snprintf(cmd, sizeof(cmd), "%d,0x%lx,0x%lx,%d", getpid(),
		 (unsigned long)a->mem, (unsigned long)a->mem + a->len, order);
	return write_str("/sys/kernel/debug/split_huge_pages", cmd);
}

/* Folios are split that children have as well, by PMDs. Kills mutants 38 and 40. */
TEST_F(split_thp, shared)
{
	struct area *a = &self->a;
	struct child child[3];

	ASSERT_TRUE(populate(a));
	for (int i = 0; i < 3; i++) {
		child[i] = start_child(NULL, contents_are_right, a);
		ASSERT_TRUE(child_is_ready(&child[i]));
	}
	ASSERT_TRUE(split_to(a, variant->order));
	EXPECT_EQ(folio_stat(a->size, "split") - a->before.split, a->nr_folios);
	EXPECT_EQ(bad_page(a), -1);
	for (size_t i = 0; i < a->nr; i++)
		write_page(a, i);
	EXPECT_EQ(bad_page(a), -1);
	/* A child has the pipes of those before it */
	for (int i = 3; i-- > 0;)
		EXPECT_TRUE(end_child(&child[i]));
}

/* What becomes a folio is mapped again run by run. */
TEST_F(split_thp, soft_dirty)
{
	struct area *a = &self->a;

	ASSERT_TRUE(populate_by_ptes(a));
	ASSERT_TRUE(mix_soft_dirty(a));
	ASSERT_TRUE(protect_all(a));
	ASSERT_TRUE(has_in_runs(a, PM_SOFT_DIRTY));
	ASSERT_TRUE(read_pagemap(a, a->saved));
	ASSERT_TRUE(split_to(a, variant->order));
	EXPECT_EQ(folio_stat(a->size, "split") - a->before.split, a->nr_folios);
	EXPECT_EQ(changed_page(a, STATE), -1);
	EXPECT_EQ(bad_page(a), -1);
}

/* Pages full of zeroes are mapped to the shared one. */
TEST_F(split_thp, zeroes)
{
	struct area *a = &self->a;

	ASSERT_TRUE(populate(a));
	for (size_t i = 0; i < a->nr; i++) {
		if (!in_run(a, i))
			continue;
		memset(page_of(a, i), 0, psize());
		a->want[i] = 0;
	}
	ASSERT_TRUE(split_to(a, variant->order));
	EXPECT_EQ(bad_page(a), -1);
	ASSERT_TRUE(read_pagemap(a, a->now));
	for (size_t i = 0; i < a->nr && variant->order == 0; i++)
		ASSERT_EQ(PAGEMAP_PFN(a->now[i]) == PAGEMAP_PFN(a->now[0]),
			  in_run(a, i));
	for (size_t i = 0; i < a->nr; i++)
		write_page(a, i);
	EXPECT_EQ(bad_page(a), -1);
}

TEST_HARNESS_MAIN
