// SPDX-License-Identifier: GPL-2.0
/*
 * Migration of large folios that are not, or not only, anonymous memory of one
 * process: shared memory, files, folios with a KSM page or a poisoned page among
 * theirs. What migrate_contents tests is not repeated: here it is what the PTEs
 * tell, and whether folios stay whole.
 *
 * KSM splits a folio of which it merges a page, and so does memory failure if it
 * can. Each is tested, too, with what leaves the folio whole: the KSM page is
 * where a page of the folio was mapped; the folio cannot be split, as it is
 * pinned.
 *
 * The lab's mutants that a test kills are named above it (lab_mutant=N):
 * 11: the dirty flag of a file's folio is not passed on
 * 31: a run may have pages that are soft-dirty and others that are not
 * 36: ... or pages mapped writable, and others that are not
 * 37: entries of a run may differ in soft-dirty and in write protection
 * 39: of a run, all are soft-dirty if a page is dirty
 */
#define _GNU_SOURCE
#include "pte_batch.h"

/* Map the file that @fd is of, fill it, have it on the first node. */
static bool populate_file(struct area *a, int fd)
{
	a->fd = fd;
	/* The page cache need not be mapped: a split leaves it to faults */
	a->may_unmap = a->op == OP_COMPACT;
	a->before = read_folio_stats(a->size);
	if (mmap(a->mem, a->len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		 fd, 0) != a->mem)
		return false;
	/* Only shared memory heeds it */
	if (madvise(a->mem, a->len, MADV_HUGEPAGE))
		return false;
	for (size_t i = 0; i < a->nr; i++)
		write_page(a, i);
	return mbind_to(a, a->node[0]);
}

/* --- shared memory -------------------------------------------------------- */

FIXTURE(shmem) {
	struct area a;
};

FIXTURE_VARIANT(shmem) {
	size_t kb;
	enum op op;
};

FIXTURE_VARIANT_ADD(shmem, 64k) { .kb = 64 };
FIXTURE_VARIANT_ADD(shmem, 1m) { .kb = 1024 };
FIXTURE_VARIANT_ADD(shmem, move_pages) { .kb = 64, .op = OP_MOVE_PAGES };
FIXTURE_VARIANT_ADD(shmem, compact) { .kb = 64, .op = OP_COMPACT };
FIXTURE_VARIANT_ADD(shmem, offline) { .kb = 64, .op = OP_OFFLINE };

/* Shared memory has folios of @size where madvise() asks for them. */
static bool use_shmem_folios_of(size_t size)
{
	struct thp_settings settings = *thp_current_settings();
	const int order = sz2ord(size, psize());

	if (!(thp_shmem_supported_orders() & (1UL << order)))
		return false;
	for (int i = 0; i < NR_ORDERS; i++)
		settings.shmem_hugepages[i].enabled = SHMEM_NEVER;
	settings.shmem_hugepages[order].enabled = SHMEM_ADVISE;
	thp_push_settings(&settings);
	return true;
}

FIXTURE_SETUP(shmem)
{
	struct area *a = &self->a;
	const char *why = area_setup(a, variant->kb, variant->op);
	int fd;

	if (!why && !softdirty_supported())
		why = "no soft-dirty tracking";
	if (!why && !use_shmem_folios_of(a->size))
		why = "no large folios of shared memory";
	if (why)
		SKIP(return, "%s", why);
	fd = memfd_create("migrate_pte_kinds", 0);
	ASSERT_EQ(ftruncate(fd, a->len), 0);
	ASSERT_TRUE(populate_file(a, fd));
	ASSERT_EQ(nr_whole(a), a->nr_folios);
}

FIXTURE_TEARDOWN(shmem)
{
	area_teardown(&self->a);
}

static bool not_in_run(struct area *a, size_t i)
{
	return !in_run(a, i);
}

/*
 * Pages in runs are mapped read-only, nothing else differs: all are mapped by
 * reading. What userfaultfd takes from clean PTEs it does not give back.
 */
static bool mix_shared_writable(struct area *a)
{
	if (mmap(a->mem, a->len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		 a->fd, 0) != a->mem)
		return false;
	force_read_pages(a->mem, a->nr, psize());
	if (!mix_uffd_wp(a))
		return false;
	for (size_t i = 0; i < a->nr; i++) {
		struct uffdio_writeprotect unprotect = {
			.range = { (uintptr_t)page_of(a, i), psize() },
		};

		if (in_run(a, i) &&
		    ioctl(a->uffd, UFFDIO_WRITEPROTECT, &unprotect))
			return false;
	}
	return true;
}

/* What can be written stays so, and nothing else. Kills mutant 36. */
TEST_F(shmem, writable)
{
	struct area *a = &self->a;

	if (!mix_shared_writable(a))
		SKIP(return, "no asynchronous write protection");
	ASSERT_EQ(page_without(a, PM_UFFD_WP, 0), -1);
	move_and_compare(_metadata, a);
	if (a->may_unmap)
		return;
	EXPECT_EQ(page_not_writable_as(a, not_in_run), -1);
	EXPECT_EQ(bad_page(a), -1);
}

/* Writing faults where it makes soft-dirty, only there. Kills mutant 39. */
TEST_F(shmem, soft_dirty)
{
	struct area *a = &self->a;

	ASSERT_TRUE(mix_soft_dirty(a));
	move_and_compare(_metadata, a);
	if (a->may_unmap)
		return;
	EXPECT_EQ(page_not_writable_as(a, in_run), -1);
	EXPECT_EQ(bad_page(a), -1);
}

/* The PTEs differ in nothing else. Kills mutants 31 and 37. */
TEST_F(shmem, soft_dirty_read_only)
{
	struct area *a = &self->a;

	ASSERT_TRUE(mix_soft_dirty(a));
	ASSERT_TRUE(protect_all(a));
	ASSERT_TRUE(has_in_runs(a, PM_SOFT_DIRTY));
	move_and_compare(_metadata, a);
}

/* A page that was protected faults, and only such a page. */
TEST_F(shmem, uffd_wp)
{
	struct area *a = &self->a;

	if (!mix_uffd_wp(a))
		SKIP(return, "no asynchronous write protection");
	move_and_compare(_metadata, a);
	if (a->may_unmap)
		return;
	EXPECT_EQ(page_not_writable_as(a, not_in_run), -1);
	EXPECT_EQ(page_without(a, PM_UFFD_WP, 0), -1);
	EXPECT_EQ(bad_page(a), -1);
}

/* The PTEs differ in nothing else. Kills mutant 37. */
TEST_F(shmem, uffd_wp_read_only)
{
	struct area *a = &self->a;

	if (!mix_uffd_wp(a))
		SKIP(return, "no asynchronous write protection");
	ASSERT_TRUE(protect_all(a));
	move_and_compare(_metadata, a);
}

static bool in_second_half(struct area *a, size_t i)
{
	return i % folio_pages(a) >= folio_pages(a) / 2;
}

/* Map the second half of each folio read-only, and pages in runs dirty. */
static bool map_half_read_only(void *arg)
{
	struct area *a = arg;

	a->pagemap = open("/proc/self/pagemap", O_RDONLY);
	for (int i = 0; i < a->nr_folios; i++)
		if (mprotect(folio_addr(a, i) + a->size / 2, a->size / 2,
			     PROT_READ))
			return false;
	for (size_t i = 0; i < a->nr; i++) {
		if (in_run(a, i) && !in_second_half(a, i))
			*(uint64_t *)page_of(a, i) = a->want[i];
		else
			FORCE_READ(*page_of(a, i));
	}
	return read_pagemap(a, a->saved);
}

static bool can_write(struct area *a, size_t i)
{
	if (sigsetjmp(after_signal, 1))
		return false;
	write_page(a, i);
	return true;
}

static bool half_is_read_only(void *arg)
{
	struct area *a = arg;

	/* In this order: reading maps what is not mapped */
	if (changed_page(a, STATE) != -1 || bad_page(a) != -1)
		return false;
	jump_on(SIGSEGV);
	for (size_t i = 0; i < a->nr; i++)
		if (can_write(a, i) == in_second_half(a, i))
			return false;
	return true;
}

/* Each process has its own PTEs back, of the same pages. */
TEST_F(shmem, two_processes)
{
	struct area *a = &self->a;
	struct child child;

	ASSERT_TRUE(mix_soft_dirty(a));
	child = start_child(map_half_read_only, half_is_read_only, a);
	ASSERT_TRUE(child_is_ready(&child));
	move_and_compare(_metadata, a);
	EXPECT_TRUE(end_child(&child));
	for (size_t i = 0; i < a->nr; i++)
		if (!in_second_half(a, i))
			next_word(a, i);
	EXPECT_EQ(bad_page(a), -1);
}

/* --- a file --------------------------------------------------------------- */

FIXTURE(file) {
	struct area a;
};

FIXTURE_VARIANT(file) {
	enum op op;
};

FIXTURE_VARIANT_ADD(file, mbind) { .op = OP_MBIND };
FIXTURE_VARIANT_ADD(file, move_pages) { .op = OP_MOVE_PAGES };
FIXTURE_VARIANT_ADD(file, compact) { .op = OP_COMPACT };
FIXTURE_VARIANT_ADD(file, offline) { .op = OP_OFFLINE };

/* A write as large as a folio makes one, on file systems that have them. */
static bool write_folios(struct area *a, int fd)
{
	char *buf = calloc(1, a->size);
	bool ok = buf;

	for (int i = 0; i < a->nr_folios && ok; i++)
		ok = pwrite(fd, buf, a->size, i * a->size) == (ssize_t)a->size;
	free(buf);
	return ok;
}

FIXTURE_SETUP(file)
{
	struct area *a = &self->a;
	const char *why = area_setup(a, 64, variant->op);
	int fd;

	if (!why && !softdirty_supported())
		why = "no soft-dirty tracking";
	if (why)
		SKIP(return, "%s", why);
	fd = open_disk_file(0);
	if (fd < 0)
		SKIP(return, "no disk file system in MIGRATE_TEST_DIR");
	ASSERT_TRUE(write_folios(a, fd));
	ASSERT_TRUE(populate_file(a, fd));
	if (nr_whole(a) != a->nr_folios)
		SKIP(return, "no large folios in MIGRATE_TEST_DIR");
}

FIXTURE_TEARDOWN(file)
{
	area_teardown(&self->a);
}

/* Is what a file has on disk what was written to memory? */
static void reread_and_compare(struct __test_metadata *_metadata,
			       struct area *a)
{
	unsigned char resident[a->nr];

	ASSERT_EQ(msync(a->mem, a->len, MS_SYNC), 0);
	ASSERT_EQ(madvise(a->mem, a->len, MADV_DONTNEED), 0);
	ASSERT_EQ(posix_fadvise(a->fd, 0, 0, POSIX_FADV_DONTNEED), 0);
	ASSERT_EQ(mincore(a->mem, a->len, resident), 0);
	for (size_t i = 0; i < a->nr; i++)
		ASSERT_EQ(resident[i] & 1, 0);
	EXPECT_EQ(bad_page(a), -1);
}

/*
 * Pages in runs are dirty, the others are clean. All are on the disk in the end.
 * Kills mutant 11.
 */
TEST_F(file, soft_dirty)
{
	struct area *a = &self->a;

	ASSERT_EQ(msync(a->mem, a->len, MS_SYNC), 0);
	ASSERT_TRUE(mix_soft_dirty(a));
	move_and_compare(_metadata, a);
	reread_and_compare(_metadata, a);
}

TEST_F(file, soft_dirty_read_only)
{
	struct area *a = &self->a;

	ASSERT_EQ(msync(a->mem, a->len, MS_SYNC), 0);
	ASSERT_TRUE(mix_soft_dirty(a));
	ASSERT_TRUE(protect_all(a));
	ASSERT_TRUE(has_in_runs(a, PM_SOFT_DIRTY));
	move_and_compare(_metadata, a);
	reread_and_compare(_metadata, a);
}

/* --- KSM ------------------------------------------------------------------ */

#define KSM_RUN		"/sys/kernel/mm/ksm/run"

/* Which page does KSM merge, one of each folio? */
enum merged {
	IN_HOLE,	/* a new one: that of the folio is mapped elsewhere */
	IN_PLACE_OF,	/* a new one: that of the folio is no longer mapped */
	OF_FOLIO,	/* that of the folio, which is split */
};

FIXTURE(ksm) {
	struct area a;
	char run[8];
};

FIXTURE_VARIANT(ksm) {
	enum merged merged;
	enum op op;
};

FIXTURE_VARIANT_ADD(ksm, in_hole) { .merged = IN_HOLE };
FIXTURE_VARIANT_ADD(ksm, in_hole_move_pages) {
	.merged = IN_HOLE,
	.op = OP_MOVE_PAGES,
};

FIXTURE_VARIANT_ADD(ksm, in_place_of) { .merged = IN_PLACE_OF };
FIXTURE_VARIANT_ADD(ksm, of_folio) { .merged = OF_FOLIO };

FIXTURE_SETUP(ksm)
{
	const char *why = area_setup(&self->a, 64, variant->op);

	if (!why && !read_file(KSM_RUN, self->run, sizeof(self->run)))
		why = "no KSM";
	if (why)
		SKIP(return, "%s", why);
	self->a.may_split = variant->merged != IN_HOLE;
	ASSERT_TRUE(populate_by_ptes(&self->a));
}

FIXTURE_TEARDOWN(ksm)
{
	ksm_stop();
	write_str(KSM_RUN, self->run);
	area_teardown(&self->a);
}

static size_t middle_of(struct area *a, int folio)
{
	return folio * folio_pages(a) + folio_pages(a) / 2;
}

static char *away(struct area *a, int folio)
{
	return a->mem + 2 * a->len + folio * a->size;
}

/* Move the page in the middle of a folio away; its place stays mapped. */
static bool make_hole(struct area *a, int folio, enum merged merged)
{
	char *page = page_of(a, middle_of(a, folio));

	switch (merged) {
	case IN_HOLE:
		return mremap(page, psize(), psize(), MREMAP_MAYMOVE |
			      MREMAP_FIXED | MREMAP_DONTUNMAP,
			      away(a, folio)) == away(a, folio);
	case IN_PLACE_OF:
		return madvise(page, psize(), MADV_DONTNEED) == 0;
	case OF_FOLIO:
		return true;
	}
	return false;
}

/* KSM looks twice at a page before it merges it, and more may have to wait. */
static bool wait_until_merged(struct area *a)
{
	for (int i = 0; i < 5; i++) {
		if (ksm_start())
			return false;
		if (ksm_get_self_merging_pages() == a->nr_folios)
			return true;
	}
	return false;
}

static bool is_one_vma(struct area *a)
{
	struct procmap_fd procmap;
	bool ok;

	if (open_self_procmap(&procmap))
		return false;
	ok = find_vma_procmap(&procmap, a->mem) &&
	     procmap.query.vma_end >= (uintptr_t)a->mem + a->len;
	close_procmap(&procmap);
	return ok;
}

/* The pages in the middle become one page. All stay in one VMA. */
static bool merge(struct area *a)
{
	for (int i = 0; i < a->nr_folios; i++) {
		size_t page = middle_of(a, i);

		a->want[page] = a->want[0];
		*(uint64_t *)page_of(a, page) = a->want[0];
		if (madvise(page_of(a, page), psize(), MADV_MERGEABLE))
			return false;
	}
	/* Not to be run any more, it would merge or split something else */
	return wait_until_merged(a) && write_str(KSM_RUN, "0") &&
	       madvise(a->mem, a->len, MADV_MERGEABLE) == 0 && is_one_vma(a);
}

/* Has each folio the same page in the middle, from @first on? */
static bool is_shared(struct area *a, int first)
{
	uint64_t pfn;

	if (!read_pagemap(a, a->now))
		return false;
	pfn = PAGEMAP_PFN(a->now[middle_of(a, first)]);
	for (int i = first; i < a->nr_folios; i++)
		if (PAGEMAP_PFN(a->now[middle_of(a, i)]) != pfn)
			return false;
	return true;
}

/* First folio whose page that is mapped elsewhere is wrong; -1 if none is. */
static int bad_away(struct area *a, uint64_t *want)
{
	for (int i = 0; i < a->nr_folios; i++)
		if (FORCE_READ(*(uint64_t *)away(a, i)) != want[i])
			return i;
	return -1;
}

/* Is that page of each folio where the others of it are? */
static bool moved_along(struct area *a)
{
	if (!read_pagemap(a, a->now))
		return false;
	for (int i = 0; i < a->nr_folios; i++)
		if (pagemap_get_pfn(a->pagemap, away(a, i)) !=
		    PAGEMAP_PFN(a->now[i * folio_pages(a)]) +
		    folio_pages(a) / 2)
			return false;
	return true;
}

/* Neither is the KSM page taken for one of the folio, nor is it unshared. */
TEST_F(ksm, merged)
{
	struct area *a = &self->a;
	uint64_t want_away[a->nr_folios];

	for (int i = 0; i < a->nr_folios; i++) {
		want_away[i] = a->want[middle_of(a, i)];
		ASSERT_TRUE(make_hole(a, i, variant->merged));
	}
	ASSERT_TRUE(merge(a));
	ASSERT_TRUE(is_shared(a, 0));
	move_and_compare(_metadata, a);
	EXPECT_EQ(ksm_get_self_merging_pages(), a->nr_folios);
	EXPECT_TRUE(is_shared(a, 0));
	if (variant->merged == IN_HOLE) {
		EXPECT_EQ(bad_away(a, want_away), -1);
		EXPECT_TRUE(moved_along(a));
	}

	write_page(a, middle_of(a, 0));
	EXPECT_EQ(bad_page(a), -1);
	EXPECT_FALSE(is_shared(a, 0));
	EXPECT_TRUE(is_shared(a, 1));
}

/* --- memory failure ------------------------------------------------------- */

FIXTURE(hwpoison) {
	struct area a;
	unsigned long pfn;
};

FIXTURE_VARIANT(hwpoison) {
	bool pinned;	/* when memory fails: the folio cannot be split */
	bool lazyfree;
	enum op op;
};

FIXTURE_VARIANT_ADD(hwpoison, split) {};
FIXTURE_VARIANT_ADD(hwpoison, pinned) { .pinned = true };
FIXTURE_VARIANT_ADD(hwpoison, pinned_move_pages) {
	.pinned = true,
	.op = OP_MOVE_PAGES,
};

FIXTURE_VARIANT_ADD(hwpoison, lazyfree) { .lazyfree = true };
FIXTURE_VARIANT_ADD(hwpoison, lazyfree_pinned) {
	.lazyfree = true,
	.pinned = true,
};

FIXTURE_SETUP(hwpoison)
{
	const char *why = area_setup(&self->a, 64, variant->op);

	if (why)
		SKIP(return, "%s", why);
	ASSERT_TRUE(populate_by_ptes(&self->a));
	if (variant->lazyfree)
		ASSERT_EQ(madvise(self->a.mem, self->a.size, MADV_FREE), 0);
}

FIXTURE_TEARDOWN(hwpoison)
{
	area_teardown(&self->a);
	if (self->pfn && unpoison_memory(self->pfn))
		TH_LOG("page 0x%lx stays poisoned", self->pfn);
}

/* All pages but @bad are as they were. That has a poison entry for a PTE. */
static void expect_others_same(struct __test_metadata *_metadata,
			       struct area *a, size_t bad)
{
	ASSERT_TRUE(read_pagemap(a, a->now));
	EXPECT_EQ(a->now[bad] & (PM_PRESENT | PM_SWAP), PM_SWAP);
	EXPECT_TRUE(is_poisoned(a, bad));
	for (size_t i = 0; i < a->nr; i++) {
		if (i == bad)
			continue;
		ASSERT_EQ((a->now[i] ^ a->saved[i]) & STATE, 0);
		ASSERT_TRUE(page_is_right(a, i));
	}
}

/* Kills mutant 39. */
TEST_F(hwpoison, others)
{
	struct area *a = &self->a;
	const size_t bad = folio_pages(a) / 3;
	unsigned long pfn;
	int err, fd = -1;

	ASSERT_TRUE(mix_soft_dirty(a));
	if (variant->pinned) {
		fd = pin(page_of(a, bad - 1), psize(), 0);
		if (fd < 0)
			SKIP(return, "no /sys/kernel/debug/gup_test to pin a page with");
	}
	pfn = pagemap_get_pfn(a->pagemap, page_of(a, bad));
	err = poison(a, bad);
	if (err == EINVAL)
		SKIP(return, "no MADV_HWPOISON");
	ASSERT_EQ(err, 0);
	self->pfn = pfn;
	close(fd);
	ASSERT_TRUE(read_pagemap(a, a->saved));
	ASSERT_EQ(!!(a->saved[bad] & PM_PRESENT), variant->pinned);
	for (int i = 0; i < 2; i++) {
		ASSERT_TRUE(start_move(a));
		ASSERT_EQ(nr_moved(a), a->nr_folios);
		expect_others_same(_metadata, a, bad);
	}
}

TEST_HARNESS_MAIN
