// SPDX-License-Identifier: GPL-2.0
/*
 * The PTEs of a large folio are replaced by entries, for migration or swap, and
 * restored from them, a run at a time. Whatever differs between its pages has
 * to survive that: contents, write permission, soft-dirty, userfaultfd's write
 * protection, exclusivity.
 *
 * Pages get their state in runs of several lengths. What can be seen of it in
 * pagemap is saved, the folios are moved (or fail to move, or are swapped out
 * and in, or split), and what is seen then has to be the same. What pagemap
 * does not show is found out by writing: who writes faults, copies, or neither.
 *
 * The lab's mutants that a test kills are named above it (lab_mutant=N):
 * 31: a run may have pages that are soft-dirty and others that are not
 * 32: ... or pages that are exclusive, and others that are not
 * 33: only the first page of a run is marked shared
 * 34: a run of pages drops one reference
 * 35: a run of pages is flushed from the TLB by its first page
 * 36: ... or pages mapped writable, and others that are not
 * 37: entries of a run may differ in soft-dirty and in write protection
 * 38: after a split, runs begin with the first page of a folio, always
 * 39: of a run, all are soft-dirty if a page is dirty
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <linux/userfaultfd.h>

#include "kselftest_harness.h"
#include "migrate_util.h"

#define SZ_1M		0x100000UL
#define NR_ACTS		8
#define MEMORY		"/sys/devices/system/memory/memory"
#define NODE		"/sys/devices/system/node/node"
#define TRACE		"/sys/kernel/tracing/instances/migrate_pte_batch/"
#define CGROUP		"/sys/fs/cgroup/"
#define OUR_CGROUP	CGROUP "migrate_pte_batch/"
#define ZRAM		"/sys/block/zram0/"

/* What a page's PTE may not lose or get. Young and dirty may spread. */
#define STATE		(PM_SOFT_DIRTY | PM_MMAP_EXCLUSIVE | PM_UFFD_WP | \
			 PM_SWAP | PM_PRESENT)

enum op {
	OP_MBIND,
	OP_MOVE_PAGES,
	OP_COMPACT,
	OP_OFFLINE,
};

/* Large folios, and what each of their pages holds. */
struct area {
	enum op op;
	int node[2];
	int at;			/* folios are on node[at] */
	int block;		/* of memory that can be taken offline */
	size_t size;		/* of a folio */
	int nr_folios;
	size_t len;		/* of all of them */
	size_t nr;		/* how many pages */
	char *mem;
	char *reserved;		/* what was mapped for it, larger */
	size_t reserved_len;
	int pagemap;
	int uffd;
	uint64_t *want;		/* contents of each page */
	uint64_t *saved;	/* pagemap entry of each page */
	uint64_t *from;		/* the same when the move began */
	uint64_t *now;
	struct folio_stats before;
};

static char *page_of(struct area *a, size_t i)
{
	return a->mem + i * psize();
}

static char *folio_addr(struct area *a, int i)
{
	return a->mem + i * a->size;
}

static size_t folio_pages(struct area *a)
{
	return a->size / psize();
}

/* Runs of one to seven pages, the same in each folio; the first is in one. */
static bool in_run(struct area *a, size_t page)
{
	size_t i = page % folio_pages(a);

	return (i % 7 < 3) != (i / 8 % 2);
}

static bool write_str(const char *path, const char *str)
{
	int fd = open(path, O_WRONLY);
	bool ok;

	if (fd < 0)
		return false;
	ok = write(fd, str, strlen(str)) == (ssize_t)strlen(str);
	close(fd);
	return ok;
}

static void write_page(struct area *a, size_t i)
{
	a->want[i] += (i + 1) * 0x9e3779b97f4a7c15ULL;
	*(uint64_t *)page_of(a, i) = a->want[i];
}

static bool page_is_right(struct area *a, size_t i)
{
	return FORCE_READ(*(uint64_t *)page_of(a, i)) == a->want[i];
}

/* First page that does not hold what it should; -1 if all do. */
static long bad_page(struct area *a)
{
	for (size_t i = 0; i < a->nr; i++)
		if (!page_is_right(a, i))
			return i;
	return -1;
}

static bool contents_are_right(void *arg)
{
	return bad_page(arg) == -1;
}

/* ... of a child that has only the pages that are in runs. */
static bool contents_are_kept(void *arg)
{
	struct area *a = arg;

	for (size_t i = 0; i < a->nr; i++)
		if (in_run(a, i) && !page_is_right(a, i))
			return false;
	return true;
}

static bool read_pagemap(struct area *a, uint64_t *entries)
{
	return pread(a->pagemap, entries, a->nr * sizeof(*entries),
		     (uintptr_t)a->mem / psize() * sizeof(*entries)) ==
	       (ssize_t)(a->nr * sizeof(*entries));
}

/* First page whose state is not what it was; -1 if all are the same. */
static long changed_page(struct area *a, uint64_t bits)
{
	if (!read_pagemap(a, a->now))
		return 0;
	for (size_t i = 0; i < a->nr; i++)
		if ((a->now[i] ^ a->saved[i]) & bits)
			return i;
	return -1;
}

/* First page whose state is not as given; -1 if all are. */
static long page_without(struct area *a, uint64_t mask, uint64_t bits)
{
	if (!read_pagemap(a, a->now))
		return 0;
	for (size_t i = 0; i < a->nr; i++)
		if ((a->now[i] & mask) != bits)
			return i;
	return -1;
}

/* Is it the pages in runs, and no others, that have this bit? */
static bool has_in_runs(struct area *a, uint64_t bit)
{
	if (!read_pagemap(a, a->now))
		return false;
	for (size_t i = 0; i < a->nr; i++)
		if (!!(a->now[i] & bit) != in_run(a, i))
			return false;
	return true;
}

/* --- set up and torn down ------------------------------------------------- */

static bool set_block(int block, const char *state)
{
	char path[64];

	snprintf(path, sizeof(path), MEMORY "%d/state", block);
	return write_str(path, state);
}

/* Have a block of memory on @node that only movable pages are taken from. */
static int make_movable_block(int node)
{
	char path[64];

	for (int block = 1023; block >= 0; block--) {
		snprintf(path, sizeof(path), NODE "%d/memory%d", node, block);
		if (access(path, F_OK) || !set_block(block, "offline"))
			continue;
		if (set_block(block, "online_movable"))
			return block;
		set_block(block, "online");
	}
	return -1;
}

/* Returns why the test has to be skipped, or NULL. */
static const char *area_setup(struct area *a, size_t kb, enum op op)
{
	const size_t pmd = read_pmd_pagesize();

	*a = (struct area) { .op = op, .pagemap = -1, .uffd = -1, .block = -1 };
	if (geteuid())
		return "needs root";
	if (!two_nodes(a->node))
		return "needs two NUMA nodes with memory";
	a->size = kb ? kb * 1024 : pmd;
	if (!thp_available() ||
	    !(thp_supported_orders() & (1UL << sz2ord(a->size, psize()))))
		return "no large folios of this size";
	a->nr_folios = a->size == pmd ? 2 : a->size >= SZ_1M ? 4 : 16;
	a->len = a->nr_folios * a->size;
	a->nr = a->len / psize();

	if (op == OP_OFFLINE || op == OP_COMPACT) {
		a->block = make_movable_block(a->node[1]);
		if (a->block < 0)
			return "no memory block can be taken offline";
	}

	/* Room to align, and for mremap() */
	a->reserved_len = 3 * a->len + 3 * pmd;
	a->reserved = mmap(NULL, a->reserved_len, PROT_NONE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	a->pagemap = open("/proc/self/pagemap", O_RDONLY);
	a->want = calloc(4 * a->nr, sizeof(*a->want));
	if (a->reserved == MAP_FAILED || a->pagemap < 0 || !a->want)
		return "no memory, or no pagemap";
	a->saved = a->want + a->nr;
	a->from = a->saved + a->nr;
	a->now = a->from + a->nr;
	a->mem = (char *)(((uintptr_t)a->reserved + pmd - 1) & -pmd);
	use_folios_of(a->size);
	return NULL;
}

static void area_teardown(struct area *a)
{
	if (a->reserved && a->reserved != MAP_FAILED)
		munmap(a->reserved, a->reserved_len);
	if (a->block >= 0 && set_block(a->block, "offline"))
		set_block(a->block, "online");
	thp_restore_settings();
}

/* Map the folios and fill them. */
static bool populate(struct area *a)
{
	a->before = read_folio_stats(a->size);
	if (mmap(a->mem, a->len, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != a->mem ||
	    mbind_node(a->mem, a->len, a->node[a->at], 0) ||
	    madvise(a->mem, a->len, MADV_HUGEPAGE))
		return false;
	for (size_t i = 0; i < a->nr; i++)
		write_page(a, i);
	/* No khugepaged here */
	return madvise(a->mem, a->len, MADV_NOHUGEPAGE) == 0 &&
	       folio_stat(a->size, "nr_anon") ==
	       a->before.nr_anon + a->nr_folios;
}

/* ... by PTEs: protecting one page of a THP splits its PMD. */
static bool populate_by_ptes(struct area *a)
{
	if (!populate(a))
		return false;
	for (int i = 0; i < a->nr_folios; i++) {
		char *page = folio_addr(a, i) + psize();

		if (mprotect(page, psize(), PROT_READ) ||
		    mprotect(page, psize(), PROT_READ | PROT_WRITE))
			return false;
	}
	return true;
}

/* --- states --------------------------------------------------------------- */

/* All pages are dirty. Those in runs become soft-dirty, the others not. */
static bool mix_soft_dirty(struct area *a)
{
	clear_softdirty();
	for (size_t i = 0; i < a->nr; i++)
		if (in_run(a, i))
			write_page(a, i);
	return has_in_runs(a, PM_SOFT_DIRTY);
}

/* Page by page: what mprotect() does to many at once may spread soft-dirty. */
static bool protect_all(struct area *a)
{
	for (size_t i = 0; i < a->nr; i++)
		if (mprotect(page_of(a, i), psize(), PROT_READ))
			return false;
	return true;
}

/* Pages in runs become write-protected, so that a write unprotects a page. */
static bool mix_uffd_wp(struct area *a)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_WP_ASYNC,
	};

	a->uffd = syscall(__NR_userfaultfd, O_CLOEXEC);
	if (a->uffd < 0 || ioctl(a->uffd, UFFDIO_API, &api) ||
	    uffd_register(a->uffd, a->mem, a->len, false, true, false))
		return false;
	for (size_t i = 0; i < a->nr; i++) {
		struct uffdio_writeprotect wp = {
			.range = { (uintptr_t)page_of(a, i), psize() },
			.mode = UFFDIO_WRITEPROTECT_MODE_WP,
		};

		if (in_run(a, i) && ioctl(a->uffd, UFFDIO_WRITEPROTECT, &wp))
			return false;
	}
	return has_in_runs(a, PM_UFFD_WP);
}

/* A child keeps the pages that are in runs; the others become exclusive. */
static struct child mix_exclusive(struct area *a, bool (*work)(void *))
{
	struct child child = { .pid = -1 };

	for (size_t i = 0; i < a->nr; i++)
		if (!in_run(a, i) &&
		    madvise(page_of(a, i), psize(), MADV_DONTFORK))
			return child;
	child = start_child(work, contents_are_kept, a);
	/* One VMA again */
	if (madvise(a->mem, a->len, MADV_DOFORK))
		child.pid = -1;
	return child;
}

/*
 * All pages are exclusive, those in runs are mapped writable: nobody has
 * written to the others since fork(), only pinned them for reading.
 */
static bool mix_writable(struct area *a)
{
	struct child child = start_child(NULL, NULL, NULL);

	if (!child_is_ready(&child) || !end_child(&child))
		return false;
	for (size_t i = 0; i < a->nr; i++) {
		int fd;

		if (in_run(a, i)) {
			write_page(a, i);
			continue;
		}
		fd = pin(page_of(a, i), psize(), 0);
		if (fd < 0)
			return false;
		close(fd);
	}
	return true;
}

static long minor_faults(void)
{
	struct rusage usage;

	getrusage(RUSAGE_THREAD, &usage);
	return usage.ru_minflt;
}

/* First page where a write faults and should not, or the other way round. */
static long page_not_writable_as(struct area *a,
				 bool (*writable)(struct area *a, size_t i))
{
	for (size_t i = 0; i < a->nr; i++) {
		long faults = minor_faults();

		write_page(a, i);
		if ((minor_faults() == faults) != writable(a, i))
			return i;
	}
	return -1;
}

/* --- moves ---------------------------------------------------------------- */

static bool move_pages_to(struct area *a, int node)
{
	void *pages[a->nr_folios];
	int nodes[a->nr_folios], status[a->nr_folios];

	for (int i = 0; i < a->nr_folios; i++) {
		pages[i] = folio_addr(a, i);
		nodes[i] = node;
	}
	return syscall(__NR_move_pages, 0, a->nr_folios, pages, nodes, status,
		       MPOL_MF_MOVE_ALL) == 0;
}

static bool mbind_to(struct area *a, int node)
{
	return mbind_node(a->mem, a->len, node, MPOL_MF_MOVE_ALL) == 0;
}

/* The block is all that its zone has; free, it is filled from below. */
static bool move_to_block(struct area *a)
{
	return move_pages_to(a, a->node[0]) && move_pages_to(a, a->node[1]) &&
	       read_pagemap(a, a->from);
}

/* How many folios are somewhere else now. */
static int nr_moved(struct area *a)
{
	int n = 0;

	if (!read_pagemap(a, a->now))
		return -1;
	for (size_t i = 0; i < a->nr; i += folio_pages(a))
		n += PAGEMAP_PFN(a->now[i]) != PAGEMAP_PFN(a->from[i]);
	return n;
}

/* Compaction moves folios up to where memory is free, but not all of it. */
static bool compact_block(struct area *a)
{
	const size_t len = 32 * SZ_1M, hole = 63 * psize();
	char path[64], *mem;
	bool ok = true;

	mem = mmap(NULL, len, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED || mbind_node(mem, len, a->node[1], 0))
		return false;
	memset(mem, 1, len);
	for (size_t i = 0; i < len; i += hole + psize())
		if (madvise(mem + i, hole, MADV_DONTNEED))
			return false;
	snprintf(path, sizeof(path), NODE "%d/compact", a->node[1]);
	/* What was freed may have been on its way still */
	for (int i = 0; ok && i < 3 && !nr_moved(a); i++)
		ok = write_str(path, "1");
	munmap(mem, len);
	return ok;
}

static bool start_move(struct area *a)
{
	if (!read_pagemap(a, a->from))
		return false;
	switch (a->op) {
	case OP_MBIND:
		a->at ^= 1;
		return mbind_to(a, a->node[a->at]);
	case OP_MOVE_PAGES:
		a->at ^= 1;
		return move_pages_to(a, a->node[a->at]);
	case OP_COMPACT:
		return move_to_block(a) && compact_block(a);
	case OP_OFFLINE:
		return move_to_block(a) && set_block(a->block, "offline") &&
		       set_block(a->block, "online_movable");
	}
	return false;
}

static void expect_same(struct __test_metadata *_metadata, struct area *a,
			uint64_t bits)
{
	struct folio_stats now = read_folio_stats(a->size);

	EXPECT_EQ(changed_page(a, bits), -1) {
		TH_LOG("a PTE is not what it was");
	}
	EXPECT_EQ(bad_page(a), -1) {
		TH_LOG("a page does not hold what it did");
	}
	/* For want of free large blocks, compaction splits */
	if (a->op == OP_COMPACT)
		return;
	EXPECT_EQ(now.nr_anon - a->before.nr_anon, a->nr_folios);
	EXPECT_EQ(now.split, a->before.split);
	EXPECT_EQ(now.split_deferred, a->before.split_deferred);
}

/* Twice, because a leak shows the second time. */
static void move_and_compare(struct __test_metadata *_metadata, struct area *a)
{
	for (int i = 0; i < 2; i++) {
		long rss = rss_anon();

		ASSERT_TRUE(read_pagemap(a, a->saved));
		ASSERT_TRUE(start_move(a));
		/* Not all need to have been in the block */
		ASSERT_GE(nr_moved(a), a->block < 0 ? a->nr_folios : 1);
		expect_same(_metadata, a, STATE);
		EXPECT_EQ(rss_anon(), rss);
	}
}

/* The folio of the page that is pinned stays, the others go. */
static void fail_and_compare(struct __test_metadata *_metadata, struct area *a,
			     char *page)
{
	int fd = pin(page, psize(), 0);

	if (fd < 0)
		SKIP(return, "no /sys/kernel/debug/gup_test to pin a page with");
	ASSERT_TRUE(read_pagemap(a, a->saved));
	ASSERT_TRUE(read_pagemap(a, a->from));
	ASSERT_TRUE(mbind_to(a, a->node[1]));
	EXPECT_EQ(nr_moved(a), a->nr_folios - 1);
	expect_same(_metadata, a, STATE);
	close(fd);
	ASSERT_TRUE(mbind_to(a, a->node[1]));
	EXPECT_EQ(nr_moved(a), a->nr_folios);
	expect_same(_metadata, a, STATE);
}

FIXTURE(pte_batch) {
	struct area a;
};

FIXTURE_VARIANT(pte_batch) {
	size_t kb;
	enum op op;
};

FIXTURE_VARIANT_ADD(pte_batch, 16k) { .kb = 16 };
FIXTURE_VARIANT_ADD(pte_batch, 64k) { .kb = 64 };
FIXTURE_VARIANT_ADD(pte_batch, 1m) { .kb = 1024 };
FIXTURE_VARIANT_ADD(pte_batch, pmd) { .kb = 0 };
FIXTURE_VARIANT_ADD(pte_batch, move_pages) { .kb = 64, .op = OP_MOVE_PAGES };
FIXTURE_VARIANT_ADD(pte_batch, compact) { .kb = 64, .op = OP_COMPACT };
FIXTURE_VARIANT_ADD(pte_batch, offline) { .kb = 64, .op = OP_OFFLINE };

FIXTURE_SETUP(pte_batch)
{
	const char *why = area_setup(&self->a, variant->kb, variant->op);

	if (why)
		SKIP(return, "%s", why);
	ASSERT_TRUE(populate_by_ptes(&self->a));
}

FIXTURE_TEARDOWN(pte_batch)
{
	area_teardown(&self->a);
}

/* What can be written stays so, and nothing else. Kills mutants 34 and 36. */
TEST_F(pte_batch, writable)
{
	struct area *a = &self->a;

	if (!mix_writable(a))
		SKIP(return, "no /sys/kernel/debug/gup_test to pin a page with");
	move_and_compare(_metadata, a);
	EXPECT_EQ(page_not_writable_as(a, in_run), -1);
}

/* Kills mutant 39: pages that are dirty, but not soft-dirty, stay so. */
TEST_F(pte_batch, soft_dirty)
{
	ASSERT_TRUE(mix_soft_dirty(&self->a));
	move_and_compare(_metadata, &self->a);
}

/* The PTEs differ in nothing else. Kills mutants 31 and 37. */
TEST_F(pte_batch, soft_dirty_read_only)
{
	struct area *a = &self->a;

	ASSERT_TRUE(mix_soft_dirty(a));
	ASSERT_TRUE(protect_all(a));
	ASSERT_TRUE(has_in_runs(a, PM_SOFT_DIRTY));
	move_and_compare(_metadata, a);
}

/* A page that was protected faults, and only such a page. */
TEST_F(pte_batch, uffd_wp)
{
	struct area *a = &self->a;

	if (!mix_uffd_wp(a))
		SKIP(return, "no asynchronous write protection");
	move_and_compare(_metadata, a);
	for (size_t i = 0; i < a->nr; i++)
		write_page(a, i);
	EXPECT_EQ(page_without(a, PM_UFFD_WP, 0), -1);
	EXPECT_EQ(bad_page(a), -1);
}

/* The PTEs differ in nothing else. Kills mutant 37. */
TEST_F(pte_batch, uffd_wp_read_only)
{
	struct area *a = &self->a;

	if (!mix_uffd_wp(a))
		SKIP(return, "no asynchronous write protection");
	ASSERT_TRUE(protect_all(a));
	move_and_compare(_metadata, a);
}

/* A write copies what the child has, too, and nothing else. */
static void write_and_compare(struct __test_metadata *_metadata, struct area *a,
			      struct child *child)
{
	ASSERT_TRUE(read_pagemap(a, a->saved));
	for (size_t i = 0; i < a->nr; i++)
		write_page(a, i);
	ASSERT_TRUE(read_pagemap(a, a->now));
	for (size_t i = 0; i < a->nr; i++)
		ASSERT_EQ(PAGEMAP_PFN(a->now[i]) != PAGEMAP_PFN(a->saved[i]),
			  in_run(a, i));
	EXPECT_EQ(bad_page(a), -1);
	EXPECT_TRUE(end_child(child));
}

TEST_F(pte_batch, exclusive)
{
	struct child child = mix_exclusive(&self->a, NULL);

	ASSERT_TRUE(child_is_ready(&child));
	move_and_compare(_metadata, &self->a);
	write_and_compare(_metadata, &self->a, &child);
}

/* The PTEs do not tell: the pages do. Kills mutant 32. */
TEST_F(pte_batch, exclusive_read_only)
{
	struct area *a = &self->a;
	struct child child = mix_exclusive(a, NULL);

	ASSERT_TRUE(child_is_ready(&child));
	ASSERT_EQ(mprotect(a->mem, a->len, PROT_READ), 0);
	move_and_compare(_metadata, a);
	ASSERT_EQ(mprotect(a->mem, a->len, PROT_READ | PROT_WRITE), 0);
	write_and_compare(_metadata, a, &child);
}

/*
 * A pinned exclusive page stops the unmap, at the first run or, if the child
 * has the first ones, later: the PTEs are put back. Kills mutant 39.
 */
TEST_F(pte_batch, aborted)
{
	struct area *a = &self->a;

	ASSERT_TRUE(mix_soft_dirty(a));
	fail_and_compare(_metadata, a, page_of(a, folio_pages(a) * 3 / 2));
}

TEST_F(pte_batch, aborted_later)
{
	struct area *a = &self->a;
	struct child child = mix_exclusive(a, NULL);
	size_t pinned = 0;

	ASSERT_TRUE(child_is_ready(&child));
	clear_softdirty();
	for (size_t i = 0; i < a->nr; i++) {
		if (in_run(a, i))
			continue;
		if (i % 2)
			write_page(a, i);
		if (i < 2 * folio_pages(a))
			pinned = i;
	}
	fail_and_compare(_metadata, a, page_of(a, pinned));
	write_and_compare(_metadata, a, &child);
}

/* Runs end where a VMA ends: each folio lies in two. */
TEST_F(pte_batch, two_vmas)
{
	struct area *a = &self->a;

	ASSERT_TRUE(mix_soft_dirty(a));
	for (int i = 0; i < a->nr_folios; i++)
		ASSERT_EQ(mprotect(folio_addr(a, i), a->size / 2, PROT_READ), 0);
	move_and_compare(_metadata, a);
}

/* ... and where a page table ends: one folio, at least, lies in two. */
TEST_F(pte_batch, two_page_tables)
{
	const size_t pmd = read_pmd_pagesize();
	struct area *a = &self->a;
	size_t boundary = (a->len * 3 / 2 + a->size + pmd - 1) & -pmd;
	char *new = a->mem + boundary - a->len / 2 - a->size / 2;

	ASSERT_TRUE(mix_soft_dirty(a));
	ASSERT_EQ(mremap(a->mem, a->len, a->len, MREMAP_MAYMOVE | MREMAP_FIXED,
			 new), new);
	a->mem = new;
	move_and_compare(_metadata, a);
}

TEST_F(pte_batch, mlocked)
{
	struct area *a = &self->a;

	ASSERT_TRUE(mix_soft_dirty(a));
	ASSERT_EQ(mlock(a->mem, a->len), 0);
	move_and_compare(_metadata, a);
	EXPECT_EQ(read_named("/proc/self/smaps_rollup", "Locked"),
		  a->len / 1024);
}

/* --- while the page tables change ----------------------------------------- */

struct race {
	struct area *a;
	bool (*act)(struct area *a);
	bool done;
	bool ok;
};

static void *run_race(void *arg)
{
	struct race *race = arg;

	race->ok = true;
	for (int i = 0; i < NR_ACTS && race->ok; i++)
		race->ok = race->act(race->a);
	race->done = true;
	return NULL;
}

static bool race_fork(struct area *a)
{
	struct child child = start_child(NULL, contents_are_right, a);

	return child_is_ready(&child) && end_child(&child);
}

static bool race_mprotect(struct area *a)
{
	for (int i = 0; i < a->nr_folios; i++)
		if (mprotect(folio_addr(a, i), a->size / 2, PROT_READ) ||
		    mprotect(folio_addr(a, i), a->size / 2,
			     PROT_READ | PROT_WRITE))
			return false;
	return true;
}

/* Half a folio goes where nothing is mapped, and comes back. */
static bool race_mremap(struct area *a)
{
	const size_t half = a->size / 2;
	char *away = a->mem + 2 * a->len;

	for (int i = 0; i < a->nr_folios; i++) {
		char *home = folio_addr(a, i);

		if (mremap(home, half, half, MREMAP_MAYMOVE | MREMAP_FIXED,
			   away) != away ||
		    mremap(away, half, half, MREMAP_MAYMOVE | MREMAP_FIXED,
			   home) != home)
			return false;
	}
	return true;
}

/* The second page of each folio is gone, from the first time on. */
static bool race_zap(struct area *a)
{
	for (int i = 0; i < a->nr_folios; i++) {
		size_t page = i * folio_pages(a) + 1;

		if (madvise(page_of(a, page), psize(), MADV_DONTNEED))
			return false;
		a->want[page] = 0;
	}
	return true;
}

/* ... or half of each folio. */
static bool race_munmap(struct area *a)
{
	for (int i = 0; i < a->nr_folios; i++) {
		char *half = folio_addr(a, i) + a->size / 2;

		if (munmap(half, a->size / 2) ||
		    mmap(half, a->size / 2, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE,
			 -1, 0) != half)
			return false;
		for (size_t j = folio_pages(a) / 2; j < folio_pages(a); j++)
			a->want[i * folio_pages(a) + j] = 0;
	}
	return true;
}

FIXTURE(race) {
	struct area a;
};

FIXTURE_VARIANT(race) {
	size_t kb;
	bool (*act)(struct area *a);
};

FIXTURE_VARIANT_ADD(race, fork_64k) { .kb = 64, .act = race_fork };
FIXTURE_VARIANT_ADD(race, fork_pmd) { .kb = 0, .act = race_fork };
FIXTURE_VARIANT_ADD(race, mprotect_64k) { .kb = 64, .act = race_mprotect };
FIXTURE_VARIANT_ADD(race, mprotect_pmd) { .kb = 0, .act = race_mprotect };
FIXTURE_VARIANT_ADD(race, mremap_64k) { .kb = 64, .act = race_mremap };
FIXTURE_VARIANT_ADD(race, mremap_pmd) { .kb = 0, .act = race_mremap };
FIXTURE_VARIANT_ADD(race, zap_64k) { .kb = 64, .act = race_zap };
FIXTURE_VARIANT_ADD(race, zap_pmd) { .kb = 0, .act = race_zap };
FIXTURE_VARIANT_ADD(race, munmap_64k) { .kb = 64, .act = race_munmap };
FIXTURE_VARIANT_ADD(race, munmap_pmd) { .kb = 0, .act = race_munmap };

FIXTURE_SETUP(race)
{
	const char *why = area_setup(&self->a, variant->kb, OP_MBIND);

	if (why)
		SKIP(return, "%s", why);
}

FIXTURE_TEARDOWN(race)
{
	area_teardown(&self->a);
}

/* Whatever another thread does meanwhile, nothing is lost. */
TEST_F(race, contents)
{
	struct race race = { .a = &self->a, .act = variant->act };

	for (int round = 0; round < 2; round++) {
		pthread_t thread;

		ASSERT_TRUE(populate_by_ptes(race.a));
		race.done = false;
		ASSERT_EQ(pthread_create(&thread, NULL, run_race, &race), 0);
		/*
		 * It may not find everything: parts are elsewhere. Both are
		 * bounded, since either may keep mmap_lock from the other.
		 */
		for (int i = 0; i < NR_ACTS && !FORCE_READ(race.done); i++)
			mbind_to(race.a, race.a->node[!(i % 2)]);
		pthread_join(thread, NULL);
		ASSERT_TRUE(race.ok);
		ASSERT_EQ(bad_page(race.a), -1);
		ASSERT_EQ(munmap(race.a->mem, race.a->len), 0);
	}
}

/* --- one CPU, which flushes at once --------------------------------------- */

FIXTURE(pte_batch_local) {
	struct area a;
	struct {
		int nr_stale;
		bool moved;
	} *shared;
};

FIXTURE_SETUP(pte_batch_local)
{
	const char *why = area_setup(&self->a, 64, OP_MBIND);
	cpu_set_t set;

	if (why)
		SKIP(return, "%s", why);
	self->shared = mmap(NULL, psize(), PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(self->shared, MAP_FAILED);
	CPU_ZERO(&set);
	CPU_SET(sched_getcpu(), &set);
	ASSERT_EQ(sched_setaffinity(0, sizeof(set), &set), 0);
}

FIXTURE_TEARDOWN(pte_batch_local)
{
	area_teardown(&self->a);
}

/*
 * The kernel writes to the pages by the page tables; what the TLB still has is
 * another page, with what was there before. Reading that does no harm.
 */
static int nr_stale_pages(struct area *a, int folio, int mem)
{
	const size_t first = folio * folio_pages(a);
	int n = 0;

	for (size_t i = first; i < first + folio_pages(a); i++) {
		uint64_t word = ++a->want[i];

		if (pwrite(mem, &word, sizeof(word),
			   (uintptr_t)page_of(a, i)) != sizeof(word))
			return 1;
	}
	for (size_t i = first; i < first + folio_pages(a); i++)
		n += !page_is_right(a, i);
	return n;
}

static bool move_and_count_stale(void *arg)
{
	FIXTURE_DATA(pte_batch_local) * self = arg;
	int mem = open("/proc/self/mem", O_RDWR);
	struct area *a = &self->a;

	if (mem < 0 || !populate(a))
		return false;
	for (int i = 0; i < 4 * a->nr_folios; i++) {
		const int folio = i % a->nr_folios;

		if (folio == 0)
			a->at ^= 1;
		/* What is read here is in the TLB */
		force_read_pages(folio_addr(a, folio), folio_pages(a), psize());
		if (mbind_node(folio_addr(a, folio), a->size, a->node[a->at],
			       MPOL_MF_MOVE_ALL))
			return false;
		self->shared->nr_stale += nr_stale_pages(a, folio, mem);
	}
	self->shared->moved = true;
	return true;
}

/* Kills mutant 35. */
TEST_F(pte_batch_local, flushed)
{
	/* The address space of a child has been on no other CPU */
	struct child child = start_child(move_and_count_stale, NULL, self);

	ASSERT_TRUE(child_is_ready(&child));
	EXPECT_TRUE(self->shared->moved);
	EXPECT_EQ(self->shared->nr_stale, 0);
	EXPECT_TRUE(end_child(&child));
}

static bool populate_child(void *arg)
{
	return populate(arg);
}

static bool move_in_child(void *arg)
{
	return start_move(arg);
}

static int count_lines(const char *path, const char *word)
{
	char line[512];
	FILE *file = fopen(path, "r");
	int n = 0;

	if (!file)
		return -1;
	while (fgets(line, sizeof(line), file))
		n += !!strstr(line, word);
	fclose(file);
	return n;
}

/* A flush for each folio, not for each page; and some for what else happens. */
TEST_F(pte_batch_local, nr_flushes)
{
	struct child child;
	char filter[64];
	int n;

	if (mkdir(TRACE, 0700) && errno != EEXIST)
		SKIP(return, "no tracefs in /sys/kernel/tracing");
	child = start_child(populate_child, move_in_child, &self->a);
	ASSERT_TRUE(child_is_ready(&child));
	/* 0: on a switch to another task */
	snprintf(filter, sizeof(filter), "common_pid == %d && reason != 0",
		 child.pid);
	EXPECT_TRUE(write_str(TRACE "events/tlb/tlb_flush/filter", filter));
	EXPECT_TRUE(write_str(TRACE "events/tlb/tlb_flush/enable", "1"));
	EXPECT_TRUE(end_child(&child));
	EXPECT_TRUE(write_str(TRACE "events/tlb/tlb_flush/enable", "0"));
	n = count_lines(TRACE "trace", "tlb_flush:");
	TH_LOG("%d flushes for %d folios", n, self->a.nr_folios);
	EXPECT_GE(n, self->a.nr_folios);
	EXPECT_LE(n, self->a.nr_folios + 8);
	rmdir(TRACE);
}

/* --- swap ----------------------------------------------------------------- */

FIXTURE(pte_batch_swap) {
	struct area a;
	const char *no_swap;
};

FIXTURE_VARIANT(pte_batch_swap) {
	size_t kb;
};

FIXTURE_VARIANT_ADD(pte_batch_swap, 16k) { .kb = 16 };
FIXTURE_VARIANT_ADD(pte_batch_swap, 64k) { .kb = 64 };
FIXTURE_VARIANT_ADD(pte_batch_swap, pmd) { .kb = 0 };

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

FIXTURE_SETUP(pte_batch_swap)
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

FIXTURE_TEARDOWN(pte_batch_swap)
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
static void swap_out(struct __test_metadata *_metadata, struct area *a)
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
	swap_out(_metadata, a);
	EXPECT_EQ(changed_page(a, kept), -1);
	EXPECT_EQ(bad_page(a), -1);
	EXPECT_EQ(changed_page(a, kept | PM_PRESENT), -1);
}

/* Kills mutant 39. */
TEST_F(pte_batch_swap, soft_dirty)
{
	ASSERT_TRUE(mix_soft_dirty(&self->a));
	swap_and_compare(_metadata, &self->a);
}

/* Kills mutant 31. */
TEST_F(pte_batch_swap, soft_dirty_read_only)
{
	ASSERT_TRUE(mix_soft_dirty(&self->a));
	ASSERT_TRUE(protect_all(&self->a));
	ASSERT_TRUE(has_in_runs(&self->a, PM_SOFT_DIRTY));
	swap_and_compare(_metadata, &self->a);
}

TEST_F(pte_batch_swap, uffd_wp)
{
	if (!mix_uffd_wp(&self->a))
		SKIP(return, "no asynchronous write protection");
	swap_and_compare(_metadata, &self->a);
}

/*
 * What the child has as well is copied on write, after swapping, too. The PTEs
 * do not tell which pages these are.
 */
TEST_F(pte_batch_swap, exclusive)
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
TEST_F(pte_batch_swap, cached)
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

/* --- split ---------------------------------------------------------------- */

FIXTURE(pte_batch_split) {
	struct area a;
};

FIXTURE_VARIANT(pte_batch_split) {
	int order;
};

FIXTURE_VARIANT_ADD(pte_batch_split, pages) { .order = 0 };
FIXTURE_VARIANT_ADD(pte_batch_split, order_4) { .order = 4 };

FIXTURE_SETUP(pte_batch_split)
{
	const char *why = area_setup(&self->a, 0, OP_MBIND);

	if (why)
		SKIP(return, "%s", why);
}

FIXTURE_TEARDOWN(pte_batch_split)
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

/* Folios are split that children have as well, by PMDs. Kills mutant 40. */
TEST_F(pte_batch_split, shared)
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

/* What becomes a folio is mapped again run by run. Kills mutant 38. */
TEST_F(pte_batch_split, soft_dirty)
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
TEST_F(pte_batch_split, zeroes)
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
