// SPDX-License-Identifier: GPL-2.0
/*
 * Migration keeps large folios what they are: in one piece, not taken for
 * partially mapped when they are not, and mlocked when they were.
 *
 * Anonymous folios of several sizes are mapped by PTEs in all the ways that
 * matter to the rmap code, moved between two nodes and back with mbind(), and
 * looked at through the mTHP statistics and /proc/vmstat. Contents are checked
 * page by page after each move.
 *
 * The lab's mutants that a test kills are named above it (lab_mutant=N):
 * 21: replacing a mapping by a migration entry counts as unmapping it
 * 22: pages that were zapped as migration entries are not noticed
 * 23: a folio that is mapped page by page is not mlocked again
 * 24: ... or mlocked once for each of its pages
 * 25: ... or mlocked although mlock() did not
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "kselftest_harness.h"
#include "migrate_util.h"

#define NR_MOVES	4
#define SZ_1M		0x100000UL

static long read_vmstat(const char *name)
{
	/* Fold what CPUs have not yet added to the global counters */
	write_num("/proc/sys/vm/stat_refresh", 1);
	return read_named("/proc/vmstat", name);
}

static uint64_t pattern(char *page, int round)
{
	return ((uintptr_t)page >> 12) * 0x9e3779b97f4a7c15ULL + round;
}

FIXTURE(large_folio) {
	int node[2];
	size_t size;		/* of a folio */
	int nr_folios;
	size_t len;		/* of all of them */
	char *mem;
	char *reserved;		/* what setup mapped, for teardown */
	size_t reserved_len;
	int round;		/* of the pattern that was written last */
	struct folio_stats before;
	long nr_mlock;
	long nr_unevictable;
};

FIXTURE_VARIANT(large_folio) {
	size_t kb;
};

FIXTURE_VARIANT_ADD(large_folio, 16k) { .kb = 16 };
FIXTURE_VARIANT_ADD(large_folio, 64k) { .kb = 64 };
FIXTURE_VARIANT_ADD(large_folio, 256k) { .kb = 256 };
FIXTURE_VARIANT_ADD(large_folio, 1m) { .kb = 1024 };
FIXTURE_VARIANT_ADD(large_folio, pmd) { .kb = 0 };

FIXTURE_SETUP(large_folio)
{
	int order;

	if (geteuid())
		SKIP(return, "needs root");
	if (!two_nodes(self->node))
		SKIP(return, "needs two NUMA nodes with memory");
	if (!thp_available())
		SKIP(return, "no transparent huge pages");

	self->size = variant->kb ? variant->kb * 1024 : read_pmd_pagesize();
	order = sz2ord(self->size, psize());
	if (!(thp_supported_orders() & (1UL << order)))
		SKIP(return, "no folios of %zu kB", self->size / 1024);

	use_folios_of(self->size);
	self->nr_mlock = read_vmstat("nr_mlock");
	self->nr_unevictable = read_vmstat("nr_unevictable");

	/* Room to align, and for mremap_across_page_tables() */
	self->nr_folios = self->size >= SZ_1M ? 8 : 32;
	self->len = self->nr_folios * self->size;
	self->reserved_len = 3 * self->len + 2 * read_pmd_pagesize();
	self->reserved = mmap(NULL, self->reserved_len, PROT_NONE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	ASSERT_NE(self->reserved, MAP_FAILED);
	self->mem = (char *)(((uintptr_t)self->reserved + read_pmd_pagesize()) &
			     -(uintptr_t)read_pmd_pagesize());
	self->before = read_folio_stats(self->size);
}

FIXTURE_TEARDOWN(large_folio)
{
	if (self->reserved && self->reserved != MAP_FAILED)
		munmap(self->reserved, self->reserved_len);
	thp_restore_settings();
}

static size_t nr_pages(FIXTURE_DATA(large_folio) * self)
{
	return self->len / psize();
}

static char *folio_addr(FIXTURE_DATA(large_folio) * self, int i)
{
	return self->mem + i * self->size;
}

static void write_pattern(FIXTURE_DATA(large_folio) * self)
{
	self->round++;
	for (size_t off = 0; off < self->len; off += psize())
		*(uint64_t *)(self->mem + off) =
			pattern(self->mem + off, self->round);
}

/* First page that does not hold the pattern of @at; -1 if all do. */
static long bad_page(FIXTURE_DATA(large_folio) * self, char *at, size_t step)
{
	for (size_t off = 0; off < self->len; off += step)
		if (*(uint64_t *)(self->mem + off) !=
		    pattern(at + off, self->round))
			return off / psize();
	return -1;
}

/* First page that is not on @node; -1 if all are. */
static long page_elsewhere(FIXTURE_DATA(large_folio) * self, int node,
			   size_t step)
{
	size_t nr = self->len / step;
	void **pages = calloc(nr, sizeof(*pages));
	int *status = calloc(nr, sizeof(*status));
	long bad = 0;

	if (!pages || !status)
		goto out;
	for (size_t i = 0; i < nr; i++)
		pages[i] = self->mem + i * step;
	if (syscall(__NR_move_pages, 0, nr, pages, NULL, status, 0))
		goto out;
	for (size_t i = nr; i > 0; i--)
		if (status[i - 1] != node)
			bad = i;
	bad--;
out:
	free(pages);
	free(status);
	return bad;
}

/* Map the folios, fill them on node[0]; they count as nr_anon. */
static void populate(struct __test_metadata *_metadata,
		     FIXTURE_DATA(large_folio) * self)
{
	char *mem = mmap(self->mem, self->len, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	ASSERT_EQ(mem, self->mem);
	ASSERT_EQ(mbind_node(mem, self->len, self->node[0], 0), 0);
	ASSERT_EQ(madvise(mem, self->len, MADV_HUGEPAGE), 0);
	write_pattern(self);
	/* No khugepaged here: it would mend what the tests look for */
	ASSERT_EQ(madvise(mem, self->len, MADV_NOHUGEPAGE), 0);
	ASSERT_EQ(folio_stat(self->size, "nr_anon"),
		  self->before.nr_anon + self->nr_folios) {
		TH_LOG("memory is not made of %zu kB folios", self->size / 1024);
	}
}

/* A PMD-mapped folio has nothing to do here: map it by PTEs. */
static void map_by_ptes(struct __test_metadata *_metadata,
			FIXTURE_DATA(large_folio) * self)
{
	if (self->size < read_pmd_pagesize())
		return;
	/* Protecting one page splits the PMD; the VMAs merge again */
	for (int i = 0; i < self->nr_folios; i++) {
		char *page = folio_addr(self, i) + psize();

		ASSERT_EQ(mprotect(page, psize(), PROT_READ), 0);
		ASSERT_EQ(mprotect(page, psize(), PROT_READ | PROT_WRITE), 0);
	}
}

static void move_to(struct __test_metadata *_metadata,
		    FIXTURE_DATA(large_folio) * self, int node)
{
	ASSERT_EQ(mbind_node(self->mem, self->len, node, MPOL_MF_MOVE_ALL), 0);
}

/* There and back: everything arrives, contents stay. */
static void move_often(struct __test_metadata *_metadata,
		       FIXTURE_DATA(large_folio) * self, char *at)
{
	for (int i = 1; i <= NR_MOVES; i++) {
		int node = self->node[i % 2];

		move_to(_metadata, self, node);
		ASSERT_EQ(page_elsewhere(self, node, psize()), -1);
		ASSERT_EQ(bad_page(self, at, psize()), -1);
	}
}

/* Nothing was split, nor marked so that it will be. */
static void expect_whole(struct __test_metadata *_metadata,
			 FIXTURE_DATA(large_folio) * self)
{
	struct folio_stats now = read_folio_stats(self->size);

	EXPECT_EQ(now.nr_anon - self->before.nr_anon, self->nr_folios);
	EXPECT_EQ(now.split - self->before.split, 0);
	EXPECT_EQ(now.split_deferred - self->before.split_deferred, 0);
	EXPECT_EQ(now.nr_anon_partially_mapped -
		  self->before.nr_anon_partially_mapped, 0);
}

/* --- partially mapped, or not -------------------------------------------- */

/* All of a folio in one piece. */
TEST_F(large_folio, stays_whole)
{
	populate(_metadata, self);
	map_by_ptes(_metadata, self);
	move_often(_metadata, self, self->mem);
	expect_whole(_metadata, self);
}

/* A VMA ends in the middle of every folio. Kills mutant 21. */
TEST_F(large_folio, straddles_vmas)
{
	populate(_metadata, self);
	for (int i = 0; i < self->nr_folios; i++)
		ASSERT_EQ(mprotect(folio_addr(self, i), self->size / 2,
				   PROT_READ), 0);
	move_often(_metadata, self, self->mem);
	expect_whole(_metadata, self);
}

/* Move the mapping so that a page table ends in the middle of a folio. */
static void mremap_across_page_tables(struct __test_metadata *_metadata,
				      FIXTURE_DATA(large_folio) * self)
{
	size_t pmd = read_pmd_pagesize();
	size_t boundary = (self->len * 3 / 2 + self->size + pmd - 1) & -pmd;
	char *new = self->mem + boundary - self->len / 2 - self->size / 2;

	ASSERT_EQ(mremap(self->mem, self->len, self->len,
			 MREMAP_MAYMOVE | MREMAP_FIXED, new), new);
	self->mem = new;
}

/* A folio (each, if PMD-sized) lies in two page tables. Kills mutant 21. */
TEST_F(large_folio, straddles_page_tables)
{
	char *at = self->mem;

	populate(_metadata, self);
	mremap_across_page_tables(_metadata, self);
	move_often(_metadata, self, at);
	expect_whole(_metadata, self);
}

static bool unmap_second_halves(void *arg)
{
	FIXTURE_DATA(large_folio) * self = arg;

	for (int i = 0; i < self->nr_folios; i++)
		if (munmap(folio_addr(self, i) + self->size / 2,
			   self->size / 2))
			return false;
	return true;
}

/*
 * A child maps only a half of each folio; the parent still maps all of it, by
 * a PMD if it can. Kills mutant 21.
 */
TEST_F(large_folio, child_maps_half)
{
	struct child child;

	populate(_metadata, self);
	child = start_child(unmap_second_halves, NULL, self);
	ASSERT_TRUE(child_is_ready(&child));
	move_often(_metadata, self, self->mem);
	expect_whole(_metadata, self);
	end_child(&child);
}

/*
 * Make the second half of each folio exclusive, and the first half not. Returns
 * false where writing after fork copies pages instead.
 */
static bool mix_exclusive(struct __test_metadata *_metadata,
			  FIXTURE_DATA(large_folio) * self)
{
	struct child child = start_child(NULL, NULL, NULL);

	ASSERT_TRUE(child_is_ready(&child));
	end_child(&child);
	map_by_ptes(_metadata, self);
	for (size_t off = 0; off < self->len; off += psize())
		if (off % self->size >= self->size / 2)
			*(uint64_t *)(self->mem + off) =
				pattern(self->mem + off, self->round);
	return folio_stat(self->size, "nr_anon_partially_mapped") ==
	       self->before.nr_anon_partially_mapped;
}

/* Kills mutant 21. */
TEST_F(large_folio, exclusive_in_part)
{
	populate(_metadata, self);
	if (!mix_exclusive(_metadata, self))
		SKIP(return, "writing after fork copies pages of a folio");
	move_often(_metadata, self, self->mem);
	expect_whole(_metadata, self);
}

/*
 * The first pages become migration entries, then a pinned exclusive page stops
 * it: the folio must be left as it was. Kills mutant 21.
 */
TEST_F(large_folio, aborted_unmap)
{
	int fd;

	populate(_metadata, self);
	if (!mix_exclusive(_metadata, self))
		SKIP(return, "writing after fork copies pages of a folio");
	fd = pin(self->mem + self->size / 2, psize(),
		 PIN_LONGTERM_TEST_FLAG_USE_WRITE);
	if (fd < 0)
		SKIP(return, "no /sys/kernel/debug/gup_test to pin a page with");
	move_to(_metadata, self, self->node[1]);
	EXPECT_EQ(node_of(self->mem), self->node[0]);
	EXPECT_EQ(node_of(folio_addr(self, 1)), self->node[1]);
	EXPECT_EQ(bad_page(self, self->mem, psize()), -1);
	expect_whole(_metadata, self);

	/* Free again, it goes like the others */
	close(fd);
	move_often(_metadata, self, self->mem);
	expect_whole(_metadata, self);
}

/* What is partially mapped is marked and, when it has to move, split. */
TEST_F(large_folio, partially_mapped)
{
	struct folio_stats now;

	populate(_metadata, self);
	ASSERT_TRUE(unmap_second_halves(self));
	now = read_folio_stats(self->size);
	EXPECT_EQ(now.nr_anon_partially_mapped -
		  self->before.nr_anon_partially_mapped, self->nr_folios);

	for (int i = 0; i < self->nr_folios; i++)
		ASSERT_EQ(mbind_node(folio_addr(self, i), self->size / 2,
				     self->node[1], MPOL_MF_MOVE), 0);
	now = read_folio_stats(self->size);
	EXPECT_EQ(now.split - self->before.split, self->nr_folios);
	EXPECT_EQ(now.nr_anon_partially_mapped,
		  self->before.nr_anon_partially_mapped);
	EXPECT_EQ(bad_page(self, self->mem, self->size), -1);
	EXPECT_EQ(page_elsewhere(self, self->node[1], self->size), -1);
}

struct zapper {
	FIXTURE_DATA(large_folio) * self;
	int pagemap;
	atomic_bool moved;	/* nothing to wait for any more */
};

/* Migration entries read as swapped pages. */
static bool is_entry(struct zapper *z, char *page)
{
	return pagemap_get_entry(z->pagemap, page) & PM_SWAP;
}

static void zap_entries(struct zapper *z, char *half, bool *zapped)
{
	if (!*zapped && (z->moved || is_entry(z, half)))
		*zapped = !madvise(half, z->self->size / 2, MADV_DONTNEED);
}

/* Second halves of folios go, if they can be caught, as migration entries. */
static void *zap_second_halves(void *arg)
{
	struct zapper *z = arg;
	const int nr = z->self->nr_folios;
	bool zapped[nr], last;

	memset(zapped, 0, sizeof(zapped));
	do {
		last = z->moved;
		for (int i = 0; i < nr; i++)
			zap_entries(z, folio_addr(z->self, i) +
				    z->self->size / 2, &zapped[i]);
	} while (!last);
	return NULL;
}

/*
 * Halves of folios are zapped while their pages are migration entries, or later
 * if they were not caught; all of the folios are partially mapped in the end, so
 * all that are not split must be marked. Kills mutant 22.
 */
TEST_F(large_folio, zapped_while_moving)
{
	struct zapper z = { .self = self };

	z.pagemap = open("/proc/self/pagemap", O_RDONLY);
	ASSERT_GE(z.pagemap, 0);
	for (int round = 0; round < 10; round++) {
		struct folio_stats now;
		pthread_t thread;

		populate(_metadata, self);
		map_by_ptes(_metadata, self);
		z.moved = false;
		ASSERT_EQ(pthread_create(&thread, NULL, zap_second_halves, &z),
			  0);
		move_to(_metadata, self, self->node[1]);
		z.moved = true;
		ASSERT_EQ(pthread_join(thread, NULL), 0);

		now = read_folio_stats(self->size);
		ASSERT_EQ(now.nr_anon - self->before.nr_anon,
			  now.nr_anon_partially_mapped -
			  self->before.nr_anon_partially_mapped);
		ASSERT_EQ(bad_page(self, self->mem, self->size), -1);
		ASSERT_EQ(munmap(self->mem, self->len), 0);
	}
	close(z.pagemap);
}

/* --- mlocked, or not ------------------------------------------------------ */

/* Pages that wait in a CPU's batch are on no LRU yet: mbind() drains them. */
static void drain_lru(struct __test_metadata *_metadata,
		      FIXTURE_DATA(large_folio) * self)
{
	char *page = mmap(NULL, psize(), PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	ASSERT_NE(page, MAP_FAILED);
	ASSERT_EQ(mbind_node(page, psize(), self->node[0], MPOL_MF_MOVE_ALL), 0);
	munmap(page, psize());
}

/* So many pages more than before are mlocked, by whatever process. */
static void expect_nr_mlock(struct __test_metadata *_metadata,
			    FIXTURE_DATA(large_folio) * self, size_t nr)
{
	drain_lru(_metadata, self);
	EXPECT_EQ(read_vmstat("nr_mlock") - self->nr_mlock, nr);
	EXPECT_EQ(read_vmstat("nr_unevictable") - self->nr_unevictable, nr);
}

/* ... by this one, which shares them with nobody. */
static void expect_mlocked(struct __test_metadata *_metadata,
			   FIXTURE_DATA(large_folio) * self, size_t nr)
{
	expect_nr_mlock(_metadata, self, nr);
	EXPECT_EQ(read_named("/proc/self/smaps_rollup", "Locked"),
		  nr * psize() / 1024);
}

static void move_mlocked(struct __test_metadata *_metadata,
			 FIXTURE_DATA(large_folio) * self)
{
	char *at = self->mem;

	for (int i = 1; i <= NR_MOVES; i++) {
		move_to(_metadata, self, self->node[i % 2]);
		expect_mlocked(_metadata, self, nr_pages(self));
	}
	EXPECT_EQ(page_elsewhere(self, self->node[NR_MOVES % 2], psize()), -1);
	EXPECT_EQ(bad_page(self, at, psize()), -1);
}

static void mlock_all(struct __test_metadata *_metadata,
		      FIXTURE_DATA(large_folio) * self)
{
	populate(_metadata, self);
	ASSERT_EQ(mlock(self->mem, self->len), 0);
	expect_mlocked(_metadata, self, nr_pages(self));
}

/* All of a folio in one piece. */
TEST_F(large_folio, stays_mlocked)
{
	mlock_all(_metadata, self);
	map_by_ptes(_metadata, self);
	expect_mlocked(_metadata, self, nr_pages(self));
	move_mlocked(_metadata, self);
	ASSERT_EQ(munlock(self->mem, self->len), 0);
	expect_mlocked(_metadata, self, 0);
}

/* Both VMAs are VM_LOCKED, neither has all of a folio. Kills mutant 23. */
TEST_F(large_folio, mlocked_in_two_vmas)
{
	mlock_all(_metadata, self);
	for (int i = 0; i < self->nr_folios; i++)
		ASSERT_EQ(mprotect(folio_addr(self, i), self->size / 2,
				   PROT_READ), 0);
	expect_mlocked(_metadata, self, nr_pages(self));
	move_mlocked(_metadata, self);
	ASSERT_EQ(munlock(self->mem, self->len), 0);
	expect_mlocked(_metadata, self, 0);
}

static bool mlock_in_child(void *arg)
{
	FIXTURE_DATA(large_folio) * self = arg;

	/* mlock() of a writable mapping would copy the pages */
	return mprotect(self->mem, self->len, PROT_READ) == 0 &&
	       mlock(self->mem, self->len) == 0;
}

/*
 * Two processes mlocked the folios: when the child ends, one mlock is left.
 */
TEST_F(large_folio, mlocked_twice)
{
	struct child child;

	mlock_all(_metadata, self);
	map_by_ptes(_metadata, self);
	child = start_child(mlock_in_child, NULL, self);
	ASSERT_TRUE(child_is_ready(&child));
	move_to(_metadata, self, self->node[1]);
	expect_nr_mlock(_metadata, self, nr_pages(self));
	end_child(&child);
	expect_mlocked(_metadata, self, nr_pages(self));
	ASSERT_EQ(munlock(self->mem, self->len), 0);
	expect_mlocked(_metadata, self, 0);
}

/* The unmap of a folio is aborted after its first pages. */
TEST_F(large_folio, mlocked_and_aborted)
{
	int fd;

	populate(_metadata, self);
	if (!mix_exclusive(_metadata, self))
		SKIP(return, "writing after fork copies pages of a folio");
	ASSERT_EQ(mlock(self->mem, self->len), 0);
	expect_mlocked(_metadata, self, nr_pages(self));
	fd = pin(self->mem + self->size / 2, psize(),
		 PIN_LONGTERM_TEST_FLAG_USE_WRITE);
	if (fd < 0)
		SKIP(return, "no /sys/kernel/debug/gup_test to pin a page with");
	move_to(_metadata, self, self->node[1]);
	EXPECT_EQ(node_of(self->mem), self->node[0]);
	expect_mlocked(_metadata, self, nr_pages(self));
	close(fd);
	ASSERT_EQ(munlock(self->mem, self->len), 0);
	expect_mlocked(_metadata, self, 0);
}

/*
 * mlock() passes over a folio that lies in two page tables; so does migration.
 * Kills mutants 24 and 25.
 */
TEST_F(large_folio, mlock_across_page_tables)
{
	long nr_mlock;

	populate(_metadata, self);
	mremap_across_page_tables(_metadata, self);
	ASSERT_EQ(mlock(self->mem, self->len), 0);
	drain_lru(_metadata, self);
	nr_mlock = read_vmstat("nr_mlock");
	move_to(_metadata, self, self->node[1]);
	drain_lru(_metadata, self);
	EXPECT_EQ(read_vmstat("nr_mlock"), nr_mlock);
	ASSERT_EQ(munlock(self->mem, self->len), 0);
	expect_mlocked(_metadata, self, 0);
}

/* Never mlocked: migration does not make it so. */
TEST_F(large_folio, not_mlocked)
{
	populate(_metadata, self);
	map_by_ptes(_metadata, self);
	expect_mlocked(_metadata, self, 0);
	move_to(_metadata, self, self->node[1]);
	expect_mlocked(_metadata, self, 0);
}

TEST_HARNESS_MAIN
