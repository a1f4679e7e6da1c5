// SPDX-License-Identifier: GPL-2.0
/*
 * The PTEs of a large folio are replaced by migration entries, and restored
 * from them, a run at a time. Whatever differs between its pages has to survive
 * that: contents, write permission, soft-dirty, userfaultfd's write protection,
 * exclusivity.
 *
 * Folios are moved, or fail to move, also while their page tables change. What
 * pagemap does not show is found out by writing: who writes faults, copies, or
 * neither.
 *
 * The lab's mutants that a test kills are named above it (lab_mutant=N):
 * 31: a run may have pages that are soft-dirty and others that are not
 * 32: ... or pages that are exclusive, and others that are not
 * 34: a run of pages drops one reference
 * 35: a run of pages is flushed from the TLB by its first page
 * 36: a run may have pages mapped writable, and others that are not
 * 37: entries of a run may differ in soft-dirty and in write protection
 * 39: of a run, all are soft-dirty if a page is dirty
 * 130: a run goes on where its VMA ends
 * 132: a run that is restored has one reference
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <sys/stat.h>

#include "pte_batch.h"

#define NR_ACTS		8
#define TRACE		"/sys/kernel/tracing/instances/migrate_pte_batch/"

/* --- states --------------------------------------------------------------- */

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

/* Can the kernel read it for us? */
static bool is_readable(const char *page)
{
	int fds[2];
	bool good;

	if (pipe(fds))
		return false;
	good = write(fds[1], page, 1) == 1;
	close(fds[0]);
	close(fds[1]);
	return good;
}

/* Also if nothing else tells their pages apart. Kills mutant 130. */
TEST_F(pte_batch, two_vmas_alike)
{
	struct area *a = &self->a;
	const size_t half = folio_pages(a) / 2;

	ASSERT_TRUE(protect_all(a));
	for (int i = 0; i < a->nr_folios; i++)
		ASSERT_EQ(mprotect(folio_addr(a, i) + a->size / 2, a->size / 2, PROT_NONE), 0);
	ASSERT_TRUE(start_move(a));
	ASSERT_GE(nr_moved(a), a->block < 0 ? a->nr_folios : 1);
	for (size_t i = 0; i < a->nr; i++)
		ASSERT_EQ(is_readable(page_of(a, i)), i % folio_pages(a) < half);
	ASSERT_EQ(mprotect(a->mem, a->len, PROT_READ | PROT_WRITE), 0);
	EXPECT_EQ(bad_page(a), -1);
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

/* How often the TLB is flushed while a child does @work. */
static int nr_flushes(struct __test_metadata *_metadata, struct area *a,
		      bool (*setup)(void *), bool (*work)(void *))
{
	struct child child = start_child(setup, work, a);
	char filter[64];
	int n;

	EXPECT_TRUE(child_is_ready(&child));
	/* 0: on a switch to another task */
	snprintf(filter, sizeof(filter), "common_pid == %d && reason != 0",
		 child.pid);
	EXPECT_TRUE(write_str(TRACE "events/tlb/tlb_flush/filter", filter));
	EXPECT_TRUE(write_str(TRACE "events/tlb/tlb_flush/enable", "1"));
	EXPECT_TRUE(end_child(&child));
	EXPECT_TRUE(write_str(TRACE "events/tlb/tlb_flush/enable", "0"));
	n = count_lines(TRACE "trace", "tlb_flush:");
	TH_LOG("%d flushes for %d folios", n, a->nr_folios);
	return n;
}

/* A flush for each folio, not for each page; and some for what else happens. */
TEST_F(pte_batch_local, nr_flushes)
{
	struct area *a = &self->a;
	int n;

	if (mkdir(TRACE, 0700) && errno != EEXIST)
		SKIP(return, "no tracefs in /sys/kernel/tracing");
	n = nr_flushes(_metadata, a, populate_child, move_in_child);
	EXPECT_GE(n, a->nr_folios);
	EXPECT_LE(n, a->nr_folios + 8);
	rmdir(TRACE);
}

/* A page of each folio gets another reference: it waits in a pipe. */
static bool populate_and_hold(void *arg)
{
	struct area *a = arg;
	int fd[2];

	if (!populate(a) || pipe(fd) ||
	    fcntl(fd[1], F_SETPIPE_SZ, a->nr_folios * psize()) < 0)
		return false;
	for (int i = 0; i < a->nr_folios; i++) {
		struct iovec iov = { folio_addr(a, i), psize() };

		if (vmsplice(fd[1], &iov, 1, 0) != psize())
			return false;
	}
	return true;
}

static bool move_in_vain(void *arg)
{
	struct area *a = arg;

	return read_pagemap(a, a->from) && mbind_to(a, a->node[1]) &&
	       nr_moved(a) == 0 && contents_are_right(a);
}

/*
 * The asynchronous attempt fails, and so does the synchronous one that follows,
 * for each folio alone: two flushes for each, not two for each page.
 */
TEST_F(pte_batch_local, nr_flushes_held)
{
	struct area *a = &self->a;
	int n;

	if (mkdir(TRACE, 0700) && errno != EEXIST)
		SKIP(return, "no tracefs in /sys/kernel/tracing");
	n = nr_flushes(_metadata, a, populate_and_hold, move_in_vain);
	EXPECT_GE(n, 2 * a->nr_folios);
	EXPECT_LE(n, 2 * a->nr_folios + 8);
	rmdir(TRACE);
}

TEST_HARNESS_MAIN
