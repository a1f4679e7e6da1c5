// SPDX-License-Identifier: GPL-2.0
/*
 * Migration entries are counted, and the search for them ends when none is left
 * (CONFIG_MIGRATION_ENTRY_COUNT).
 *
 * Memory of one process, or shared by a family, is moved, while its pages are
 * where they are found last: in a child only, in the parent only, in all; while
 * processes fork, exit, unmap, protect, or copy what is being moved. Contents are
 * checked, and how the walks ended. An entry that is missed never goes away: who
 * touches its page hangs, and the test runs out of time.
 *
 * If something is not uncounted, its slot in the table stays above zero, and no
 * walk for a page with that slot will end early again. So walks that ask all VMAs
 * show what went wrong long before, if pages are moved one by one, and nothing
 * else is. With the debug option, the total must be zero as well.
 *
 * The lab's mutants that a test kills are named above it (lab_mutant=N):
 * 51: fork() copies an entry and does not count it
 * 52: an entry that is zapped stays counted
 * 53: a PMD's entry that is split stays counted
 * 54: an entry that is replaced by the zero page stays counted
 * 55: an entry of hugetlb that is unmapped stays counted
 * 56: the walk ends although the count is not zero
 * 57: there are entries from before counting began
 * 58: a PMD's entry that is split is uncounted before the PTEs' are counted
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/uio.h>

#include "pte_batch.h"

#define NR_CHILDREN	8
#define NR_MANY		200
#define NR_ROUNDS	4
#define NR_HUGETLB	48
#define TIMEOUT		100	/* seconds */

/* One more way to move: migrate_pages(2) */
#define OP_MIGRATE_PAGES	(OP_OFFLINE + 1)

#define TOTAL		"/sys/kernel/debug/migration_entry_count/total"
#define SWITCHES	"/sys/kernel/mm/migration_entry_count/"
#define TRUSTED		SWITCHES "trusted"
#define COUNTING	SWITCHES "counting"
#define SPLIT		"/sys/kernel/debug/split_huge_pages"
#define KSM_RUN		"/sys/kernel/mm/ksm/run"

/* A debug kernel is slow, and checks more than the test can. */
static bool is_slow(void)
{
	return access(TOTAL, F_OK) == 0;
}

static int nr_many(void)
{
	return is_slow() ? NR_MANY / 4 : NR_MANY;
}

static int nr_rounds(void)
{
	return is_slow() ? NR_ROUNDS / 2 : NR_ROUNDS;
}

/* --- how walks end -------------------------------------------------------- */

struct walks {
	long all;
	long stopped;
	long full;
	long skipped;
};

/* In one pass: whoever else moves pages may count between two. */
static struct walks read_walks(void)
{
	struct walks w = { -1, -1, -1, -1 };
	FILE *file = fopen("/proc/vmstat", "r");
	char name[64];
	long value;

	if (!file)
		return w;
	while (fscanf(file, "%63s %ld", name, &value) == 2) {
		if (!strcmp(name, "migration_entry_walk"))
			w.all = value;
		else if (!strcmp(name, "migration_entry_walk_stopped"))
			w.stopped = value;
		else if (!strcmp(name, "migration_entry_walk_full"))
			w.full = value;
		else if (!strcmp(name, "migration_entry_walk_skipped"))
			w.skipped = value;
	}
	fclose(file);
	return w;
}

static struct walks walks_since(struct walks before)
{
	struct walks now = read_walks();

	return (struct walks) {
		now.all - before.all,
		now.stopped - before.stopped,
		now.full - before.full,
		now.skipped - before.skipped,
	};
}

static bool is_counting(void)
{
	if (read_walks().all < 0)
		return false;
	return access(COUNTING, F_OK) || read_num(COUNTING);
}

/* Somebody else may have begun to move a page. */
static bool none_left(void)
{
	if (access(TOTAL, F_OK))
		return true;
	for (int i = 0; i < 1000; i++) {
		if (!read_num(TOTAL))
			return true;
		sched_yield();
	}
	return false;
}

/* All walks since then ended early, and at least so many began. */
static void expect_stopped(struct __test_metadata *_metadata,
			   struct walks before, long at_least)
{
	struct walks w = walks_since(before);

	if (!is_counting())
		return;
	EXPECT_GE(w.all + w.skipped, at_least);
	EXPECT_EQ(w.all - w.stopped, 0) {
		TH_LOG("entries were left, or are counted that are not there");
	}
}

static void expect_none_left(struct __test_metadata *_metadata)
{
	struct walks w = read_walks();

	EXPECT_TRUE(none_left());
	if (w.full >= 0)
		EXPECT_EQ(w.all, w.stopped + w.full);
}

/* --- what is moved -------------------------------------------------------- */

enum kind {
	ANON,
	SHMEM,
	PAGE_CACHE,
	KSM,
	HUGETLB,
	HUGETLB_SHARED,
};

struct how {
	enum kind kind;
	size_t kb;	/* of a folio; 0: as large as what a PMD maps */
	bool small;	/* ... or a single page */
	bool by_pmd;
	int op;
};

/* The least that can be unmapped. */
static size_t piece;

static bool map_area(struct area *a, int flags)
{
	return mmap(a->mem, a->len, PROT_READ | PROT_WRITE, flags | MAP_FIXED,
		    a->fd, 0) == a->mem &&
	       mbind_node(a->mem, a->len, a->node[a->at], 0) == 0;
}

static bool fill(struct area *a)
{
	for (size_t i = 0; i < a->nr; i++)
		write_page(a, i);
	return true;
}

static bool populate_anon(struct area *a, const struct how *how)
{
	if (how->small)
		return map_area(a, MAP_PRIVATE | MAP_ANONYMOUS) && fill(a);
	return how->by_pmd ? populate(a) : populate_by_ptes(a);
}

/* On the first node in the end: the page cache does not heed the policy. */
static bool populate_file(struct area *a, bool large)
{
	return a->fd >= 0 && ftruncate(a->fd, a->len) == 0 &&
	       map_area(a, MAP_SHARED) &&
	       !(large && madvise(a->mem, a->len, MADV_HUGEPAGE)) &&
	       fill(a) && mbind_to(a, a->node[a->at]);
}

static bool populate_shmem(struct area *a, const struct how *how)
{
	struct thp_settings settings = *thp_current_settings();
	const int order = sz2ord(a->size, psize());

	for (int i = 0; i < NR_ORDERS; i++)
		settings.shmem_hugepages[i].enabled = SHMEM_NEVER;
	if (!how->small)
		settings.shmem_hugepages[order].enabled = SHMEM_ADVISE;
	thp_push_settings(&settings);
	a->fd = memfd_create("migrate_entry_count", 0);
	return populate_file(a, !how->small);
}

static bool populate_page_cache(struct area *a)
{
	char path[256];

	snprintf(path, sizeof(path), "%s/migrate_entry_count_XXXXXX",
		 getenv("MIGRATE_TEST_DIR") ?: ".");
	a->fd = mkstemp(path);
	unlink(path);
	return populate_file(a, false);
}

/* Each page is there sixteen times. */
static bool populate_ksm(struct area *a)
{
	if (!map_area(a, MAP_PRIVATE | MAP_ANONYMOUS) || !fill(a))
		return false;
	for (size_t i = 0; i < a->nr; i++) {
		a->want[i] = a->want[i % (a->nr / 16)];
		*(uint64_t *)page_of(a, i) = a->want[i];
	}
	if (madvise(a->mem, a->len, MADV_MERGEABLE))
		return false;
	for (int i = 0; i < 5; i++) {
		if (ksm_start())
			return false;
		if (ksm_get_self_merging_pages() == a->nr)
			return write_str(KSM_RUN, "0");
	}
	return false;
}

static bool populate_hugetlb(struct area *a, bool shared)
{
	if (!shared)
		return map_area(a, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB) &&
		       fill(a);
	a->fd = memfd_create("migrate_entry_count", MFD_HUGETLB);
	return populate_file(a, false);
}

static bool populate_kind(struct area *a, const struct how *how)
{
	switch (how->kind) {
	case ANON:
		return populate_anon(a, how);
	case SHMEM:
		return populate_shmem(a, how);
	case PAGE_CACHE:
		return populate_page_cache(a);
	case KSM:
		return populate_ksm(a);
	case HUGETLB:
	case HUGETLB_SHARED:
		return populate_hugetlb(a, how->kind == HUGETLB_SHARED);
	}
	return false;
}

static const char *setup_hugetlb(struct area *a)
{
	if (default_huge_page_size() != a->size)
		return "no hugetlb pages as large as a PMD's";
	if (!hugetlb_setup_default_exact(NR_HUGETLB))
		return "not enough memory for hugetlb pages";
	return NULL;
}

/* Returns why the test has to be skipped, or NULL. */
static const char *setup(struct area *a, const struct how *how)
{
	const char *why = area_setup(a, how->small ? 64 : how->kb, how->op);

	if (why)
		return why;
	if (how->small) {
		a->size = psize();
		a->nr_folios = a->nr;
	}
	piece = how->kind >= HUGETLB ? folio_pages(a) : 1;
	if (how->kind >= HUGETLB)
		return setup_hugetlb(a);
	if (how->kind == KSM && access(KSM_RUN, W_OK))
		return "no KSM";
	if (how->kind == SHMEM && !how->small &&
	    !(thp_shmem_supported_orders() & (1UL << sz2ord(a->size, psize()))))
		return "no large folios of shared memory";
	return NULL;
}

static void teardown(struct __test_metadata *_metadata, struct area *a,
		     const struct how *how)
{
	area_teardown(a);
	if (a->fd >= 0)
		close(a->fd);
	if (how->kind == KSM && !access(KSM_RUN, W_OK)) {
		ksm_stop();
		write_str(KSM_RUN, "0");
	}
	if (how->kind >= HUGETLB)
		hugetlb_restore_settings();
	expect_none_left(_metadata);
}

/* Everything that the process has. */
static bool migrate_to(int from, int to)
{
	unsigned long old = 1UL << from, new = 1UL << to;

	return syscall(__NR_migrate_pages, 0, 8 * sizeof(old), &old, &new) >= 0;
}

static bool move(struct area *a)
{
	if ((int)a->op != OP_MIGRATE_PAGES)
		return start_move(a);
	a->at ^= 1;
	return read_pagemap(a, a->from) &&
	       migrate_to(a->node[a->at ^ 1], a->node[a->at]);
}

/*
 * To the other node, a folio at a time: what is counted then is of this folio,
 * so nothing else can be in its slots.
 */
static long move_one_by_one(struct area *a)
{
	const int n = a->nr_folios > 16 ? 16 : a->nr_folios;
	int status, node;

	if (!read_pagemap(a, a->from))
		return -1;
	for (int i = 0; i < n; i++) {
		void *page = folio_addr(a, i);

		node = a->node[node_of(page) == a->node[0]];

		if (syscall(__NR_move_pages, 0, 1, &page, &node, &status,
			    MPOL_MF_MOVE_ALL))
			return -1;
	}
	return nr_moved(a);
}

/* Nobody does anything else now: no walk needs to ask all VMAs. */
static void expect_quiet(struct __test_metadata *_metadata, struct area *a)
{
	EXPECT_EQ(bad_page(a), -1);
	EXPECT_TRUE(none_left());
	for (int i = 0; i < 2; i++) {
		struct walks before = read_walks();

		EXPECT_GE(move_one_by_one(a), 1);
		expect_stopped(_metadata, before, 1);
		EXPECT_EQ(bad_page(a), -1);
	}
}

/* --- while nobody does anything else -------------------------------------- */

struct family {
	struct child child[NR_MANY];
	int n;
};

static void start_children(struct __test_metadata *_metadata,
			   struct family *family, int n, struct area *a,
			   bool (*work)(void *), bool (*check)(void *))
{
	while (family->n < n) {
		struct child *child = &family->child[family->n];

		*child = start_child(work, check, a);
		ASSERT_TRUE(child_is_ready(child));
		family->n++;
	}
}

/* The last one first: it has the pipes of those before. */
static bool end_children(struct family *family)
{
	bool ok = true;

	while (family->n)
		ok &= end_child(&family->child[--family->n]);
	return ok;
}

FIXTURE(kind) {
	struct area a;
	struct family family;
};

FIXTURE_VARIANT(kind) {
	struct how how;
};

FIXTURE_VARIANT_ADD(kind, page) { .how = { .small = true } };
FIXTURE_VARIANT_ADD(kind, ptes) { .how = { .by_pmd = false } };
FIXTURE_VARIANT_ADD(kind, pmd) { .how = { .by_pmd = true } };
FIXTURE_VARIANT_ADD(kind, move_pages) {
	.how = { .kb = 64, .op = OP_MOVE_PAGES },
};

FIXTURE_VARIANT_ADD(kind, migrate_pages) {
	.how = { .small = true, .op = OP_MIGRATE_PAGES },
};

FIXTURE_VARIANT_ADD(kind, compact) { .how = { .kb = 64, .op = OP_COMPACT } };
FIXTURE_VARIANT_ADD(kind, shmem) { .how = { .kind = SHMEM, .kb = 64 } };
FIXTURE_VARIANT_ADD(kind, shmem_pmd) { .how = { .kind = SHMEM } };
FIXTURE_VARIANT_ADD(kind, file) { .how = { .kind = PAGE_CACHE, .small = true } };
FIXTURE_VARIANT_ADD(kind, ksm) { .how = { .kind = KSM, .small = true } };
FIXTURE_VARIANT_ADD(kind, hugetlb) { .how = { .kind = HUGETLB } };
FIXTURE_VARIANT_ADD(kind, hugetlb_shared) { .how = { .kind = HUGETLB_SHARED } };

FIXTURE_SETUP(kind)
{
	const char *why = setup(&self->a, &variant->how);

	self->family.n = 0;
	if (why)
		SKIP(return, "%s", why);
	ASSERT_TRUE(populate_kind(&self->a, &variant->how));
}

FIXTURE_TEARDOWN(kind)
{
	EXPECT_TRUE(end_children(&self->family));
	teardown(_metadata, &self->a, &variant->how);
}

/* Is what is written seen by others? */
static bool is_shared(struct area *a)
{
	return a->fd >= 0;
}

/* The others see it, or it becomes a copy. */
static void write_again(struct area *a, size_t i)
{
	if (is_shared(a))
		*(uint64_t *)page_of(a, i) = a->want[i];
	else
		write_page(a, i);
}

static bool copy_all(void *arg)
{
	struct area *a = arg;

	for (size_t i = 0; i < a->nr; i++)
		write_again(a, i);
	return bad_page(a) == -1;
}

static bool unmap_half(void *arg)
{
	struct area *a = arg;

	return contents_are_right(a) && munmap(a->mem, a->len / 2) == 0;
}

static bool second_half_is_right(void *arg)
{
	struct area *a = arg;

	for (size_t i = a->nr / 2; i < a->nr; i++)
		if (!page_is_right(a, i))
			return false;
	return true;
}

static void move_and_check(struct __test_metadata *_metadata, struct area *a)
{
	ASSERT_TRUE(move(a));
	EXPECT_GE(nr_moved(a), 1);
	expect_quiet(_metadata, a);
}

/* Nobody else has the pages: walks end when they have been mapped again. */
TEST_F_TIMEOUT(kind, copied_by_children, TIMEOUT)
{
	start_children(_metadata, &self->family, NR_CHILDREN, &self->a,
		       copy_all, contents_are_right);
	move_and_check(_metadata, &self->a);
}

/* All have them; they have been moved before, too. Kills mutant 56. */
TEST_F_TIMEOUT(kind, shared, TIMEOUT)
{
	ASSERT_TRUE(move(&self->a));
	start_children(_metadata, &self->family, NR_CHILDREN, &self->a,
		       contents_are_right, contents_are_right);
	move_and_check(_metadata, &self->a);
}

/* Those that are found first have half of them. */
TEST_F_TIMEOUT(kind, unmapped_in_part, TIMEOUT)
{
	start_children(_metadata, &self->family, NR_CHILDREN, &self->a,
		       unmap_half, second_half_is_right);
	move_and_check(_metadata, &self->a);
}

/* Pages are pinned: none becomes an entry, or what has become one is undone. */
TEST_F_TIMEOUT(kind, pinned, TIMEOUT)
{
	struct walks before;
	struct area *a = &self->a;
	int fd;

	/* A file is not pinned to be written; pages of KSM are no longer then */
	fd = pin(a->mem, a->len,
		 is_shared(a) ? 0 : PIN_LONGTERM_TEST_FLAG_USE_WRITE);
	if (fd < 0)
		SKIP(return, "no gup_test");
	before = read_walks();
	EXPECT_EQ(move_one_by_one(a), -1);
	expect_stopped(_metadata, before, 1);
	EXPECT_EQ(bad_page(a), -1);
	close(fd);
	expect_quiet(_metadata, a);
	EXPECT_TRUE(copy_all(a));
}

/* A pipe gets a page of each folio, but not a pin: returns where to read. */
static int hold(struct area *a)
{
	struct iovec iov[a->nr_folios];
	int fd[2];

	for (int i = 0; i < a->nr_folios; i++)
		iov[i] = (struct iovec) { folio_addr(a, i), psize() };
	if (pipe(fd))
		return -1;
	if (fcntl(fd[1], F_SETPIPE_SZ, a->nr_folios * psize()) < 0 ||
	    vmsplice(fd[1], iov, a->nr_folios, 0) !=
	    (ssize_t)(a->nr_folios * psize())) {
		close(fd[0]);
		fd[0] = -1;
	}
	close(fd[1]);
	return fd[0];
}

/*
 * All pages become entries, in all processes, before it is seen that somebody
 * has a reference: the entries are undone. Kills mutant 56.
 */
TEST_F_TIMEOUT(kind, held, TIMEOUT)
{
	struct walks before;
	struct area *a = &self->a;
	int fd;

	start_children(_metadata, &self->family, NR_CHILDREN, a,
		       contents_are_right, contents_are_right);
	fd = hold(a);
	ASSERT_GE(fd, 0);
	before = read_walks();
	EXPECT_EQ(move_one_by_one(a), -1);
	expect_stopped(_metadata, before, 1);
	EXPECT_EQ(bad_page(a), -1);
	/* ... all at once */
	move(a);
	EXPECT_EQ(bad_page(a), -1);
	close(fd);
	expect_quiet(_metadata, a);
}

/* --- while pages are moved ------------------------------------------------ */

/* A thread that moves pages until it is told to stop. */
struct mover {
	struct area *a;
	pthread_t thread;
	atomic_bool stop;
	atomic_int moves;
};

/* Not each move succeeds: pages are busy, processes are gone. */
static void *keep_moving(void *arg)
{
	struct mover *m = arg;

	while (!m->stop) {
		move(m->a);
		m->moves++;
	}
	return NULL;
}

static bool start_mover(struct mover *m, struct area *a)
{
	*m = (struct mover) { .a = a };
	return pthread_create(&m->thread, NULL, keep_moving, m) == 0;
}

static void stop_mover(struct mover *m)
{
	m->stop = true;
	pthread_join(m->thread, NULL);
}

/* A part that begins and ends in the middle of a folio, if that is possible. */
static size_t part_start(struct area *a)
{
	return a->nr / 8 * 3 / piece * piece;
}

static size_t part_end(struct area *a)
{
	return a->nr / 8 * 5 / piece * piece;
}

static char *part(struct area *a)
{
	return page_of(a, part_start(a));
}

static size_t part_len(struct area *a)
{
	return (part_end(a) - part_start(a)) * psize();
}

static bool others_are_right(struct area *a)
{
	for (size_t i = 0; i < a->nr; i++)
		if ((i < part_start(a) || i >= part_end(a)) &&
		    !page_is_right(a, i))
			return false;
	return true;
}

static bool unmap(struct area *a)
{
	return munmap(part(a), part_len(a)) == 0 && others_are_right(a);
}

static bool discard(struct area *a)
{
	if (madvise(part(a), part_len(a), MADV_DONTNEED))
		return false;
	for (size_t i = part_start(a); i < part_end(a) && !is_shared(a); i++)
		a->want[i] = 0;
	return bad_page(a) == -1;
}

static bool leave(struct area *a)
{
	return true;
}

static bool die(struct area *a)
{
	kill(getpid(), SIGKILL);
	return false;
}

static bool protect(struct area *a)
{
	if (mprotect(part(a), part_len(a), PROT_READ) || bad_page(a) != -1 ||
	    mprotect(part(a), part_len(a), PROT_READ | PROT_WRITE))
		return false;
	for (size_t i = part_start(a); i < part_end(a); i++)
		write_again(a, i);
	return bad_page(a) == -1;
}

static bool lock(struct area *a)
{
	return mlock(a->mem, a->len) == 0 && bad_page(a) == -1 &&
	       munlock(part(a), part_len(a)) == 0 && bad_page(a) == -1;
}

static bool copy(struct area *a)
{
	for (size_t i = part_start(a); i < part_end(a); i++)
		write_again(a, i);
	return bad_page(a) == -1;
}

/* Half of it, whole PMDs if there are some. */
static bool remap(struct area *a)
{
	char *to = a->mem + 2 * a->len;

	if (mremap(a->mem, a->len / 2, a->len / 2,
		   MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		return false;
	for (size_t i = 0; i < a->nr / 2; i++)
		if (*(uint64_t *)(to + i * psize()) != a->want[i])
			return false;
	return second_half_is_right(a);
}

static bool fork_again(struct area *a)
{
	int status = -1;
	pid_t pid = fork();

	if (!pid)
		_exit(bad_page(a) != -1);
	return waitpid(pid, &status, 0) == pid && !status && bad_page(a) == -1;
}

/* Two move the same pages, to and fro. */
static bool move_too(struct area *a)
{
	for (int i = 0; i < 2; i++)
		mbind_to(a, a->node[i]);
	return bad_page(a) == -1;
}

/* Entries can be seen in pagemap; if there is none for long, that is all right. */
static void wait_for_entry(struct area *a, char *page)
{
	for (int i = 0; i < 2000; i++)
		if (!(pagemap_get_entry(a->pagemap, page) & PM_PRESENT))
			return;
}

/* What a child does to its part while this is being moved. */
static bool act_in_child(struct area *a, bool (*act)(struct area *), int delay)
{
	a->pagemap = open("/proc/self/pagemap", O_RDONLY);
	if (is_shared(a))
		force_read_pages(a->mem, a->nr, psize());
	wait_for_entry(a, part(a));
	for (int i = 0; i < delay; i++)
		FORCE_READ(delay);
	return act(a);
}

static pid_t start_act(struct area *a, bool (*act)(struct area *), int delay)
{
	pid_t pid = fork();

	if (!pid)
		_exit(!act_in_child(a, act, delay));
	return pid;
}

static bool end_act(pid_t pid, bool (*act)(struct area *))
{
	int status = -1;

	if (waitpid(pid, &status, 0) != pid)
		return false;
	return act == die ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL :
			    status == 0;
}

#define MAX_ACTS	4

struct acts {
	bool (*act[MAX_ACTS])(struct area *a);
};

/* A child for each; all act at the same time. */
static void start_acts(struct area *a, const struct acts *acts, int delay,
		       pid_t *pid)
{
	for (int i = 0; i < MAX_ACTS && acts->act[i]; i++)
		pid[i] = start_act(a, acts->act[i], delay);
}

/* Returns the first that failed, or -1. */
static int end_acts(const struct acts *acts, pid_t *pid)
{
	int failed = -1;

	for (int i = 0; i < MAX_ACTS && acts->act[i]; i++)
		if (!end_act(pid[i], acts->act[i]) && failed < 0)
			failed = i;
	return failed;
}

/* Until there have been so many rounds, and as many moves. */
static void race(struct __test_metadata *_metadata, struct area *a,
		 const struct acts *acts, int rounds)
{
	struct mover m;
	int failed = -1;

	ASSERT_TRUE(start_mover(&m, a));
	for (int i = 0; failed < 0 && (i < rounds || m.moves < rounds); i++) {
		pid_t pid[MAX_ACTS];

		start_acts(a, acts, i % 8 * 1000, pid);
		failed = end_acts(acts, pid);
		/* Some become exclusive again */
		for (size_t page = i % 8; page < a->nr; page += 8)
			write_again(a, page);
		EXPECT_EQ(bad_page(a), -1)
			failed = 0;
	}
	stop_mover(&m);
	EXPECT_EQ(failed, -1);
}

static void race_of(struct __test_metadata *_metadata, struct area *a,
		    const struct acts *acts)
{
	race(_metadata, a, acts, a->op == OP_COMPACT ? 2 : nr_rounds());
	expect_quiet(_metadata, a);
}

/* Kills mutants 51, 52 and 55. */
TEST_F_TIMEOUT(kind, zap, TIMEOUT)
{
	const struct acts zap = { { unmap, discard, leave, die } };

	race_of(_metadata, &self->a, &zap);
}

/* Kills mutants 51 and 53. */
TEST_F_TIMEOUT(kind, change, TIMEOUT)
{
	const struct acts change = { { protect, lock, copy } };

	race_of(_metadata, &self->a, &change);
}

/* Kills mutant 51. */
TEST_F_TIMEOUT(kind, move, TIMEOUT)
{
	const struct acts moves = { { remap, move_too, fork_again } };

	race_of(_metadata, &self->a, &moves);
}

/* --- many processes ------------------------------------------------------- */

FIXTURE(many) {
	struct area a;
	struct family family;
};

FIXTURE_VARIANT(many) {
	struct how how;
};

FIXTURE_VARIANT_ADD(many, anon) { .how = { .kb = 64 } };
FIXTURE_VARIANT_ADD(many, shmem) { .how = { .kind = SHMEM, .small = true } };
FIXTURE_VARIANT_ADD(many, shmem_pmd) { .how = { .kind = SHMEM } };

FIXTURE_SETUP(many)
{
	const char *why = setup(&self->a, &variant->how);

	self->family.n = 0;
	if (why)
		SKIP(return, "%s", why);
	ASSERT_TRUE(populate_kind(&self->a, &variant->how));
}

FIXTURE_TEARDOWN(many)
{
	EXPECT_TRUE(end_children(&self->family));
	teardown(_metadata, &self->a, &variant->how);
}

static bool first_is_right(void *arg)
{
	return page_is_right(arg, 0);
}

/* The first page is everywhere, others are not. Kills mutant 56. */
TEST_F_TIMEOUT(many, one_page, TIMEOUT)
{
	start_children(_metadata, &self->family, nr_many(), &self->a,
		       first_is_right, first_is_right);
	expect_quiet(_metadata, &self->a);
}

/*
 * All are, and one process dies after the other, while pages are moved, until
 * none is left. Kills mutants 52 and 56.
 */
TEST_F_TIMEOUT(many, all_pages, TIMEOUT)
{
	struct family *family = &self->family;
	struct mover m;

	start_children(_metadata, family, nr_many(), &self->a,
		       contents_are_right, NULL);
	expect_quiet(_metadata, &self->a);
	ASSERT_TRUE(start_mover(&m, &self->a));
	for (int i = 0; family->n; i++) {
		while (m.moves < i / 32)
			sched_yield();
		kill(family->child[--family->n].pid, SIGKILL);
		end_child(&family->child[family->n]);
	}
	stop_mover(&m);
	expect_quiet(_metadata, &self->a);
}

/* --- split of a folio ----------------------------------------------------- */

FIXTURE(split) {
	struct area a;
	struct family family;
};

FIXTURE_VARIANT(split) {
	int order;
};

FIXTURE_VARIANT_ADD(split, pages) { .order = 0 };
FIXTURE_VARIANT_ADD(split, order_4) { .order = 4 };

static const struct how by_pmd = { .by_pmd = true };

FIXTURE_SETUP(split)
{
	const char *why = setup(&self->a, &by_pmd);

	self->family.n = 0;
	if (!why && access(SPLIT, W_OK))
		why = "no " SPLIT;
	if (why)
		SKIP(return, "%s", why);
	ASSERT_TRUE(populate(&self->a));
}

FIXTURE_TEARDOWN(split)
{
	EXPECT_TRUE(end_children(&self->family));
	teardown(_metadata, &self->a, &by_pmd);
}

static bool split_to(struct area *a, int order)
{
	char cmd[96];

	snprintf(cmd, sizeof(cmd), "%d,0x%lx,0x%lx,%d", getpid(),
		 (unsigned long)a->mem, (unsigned long)a->mem + a->len, order);
	return write_str(SPLIT, cmd);
}

/* All are split, contents are kept, and no walk asks all VMAs. */
static void split_with_children(struct __test_metadata *_metadata,
				FIXTURE_DATA(split) * self, int order,
				bool (*work)(void *))
{
	struct area *a = &self->a;
	struct walks before;

	start_children(_metadata, &self->family, NR_CHILDREN, a, work,
		       contents_are_right);
	before = read_walks();
	EXPECT_TRUE(split_to(a, order));
	EXPECT_EQ(folio_stat(a->size, "split") - a->before.split, a->nr_folios);
	expect_stopped(_metadata, before, a->nr_folios);
	EXPECT_EQ(bad_page(a), -1);
	EXPECT_TRUE(end_children(&self->family));
	fill(a);
	a->size = psize() << order;
	a->nr_folios = a->len / a->size;
	expect_quiet(_metadata, a);
}

TEST_F_TIMEOUT(split, copied_by_children, TIMEOUT)
{
	split_with_children(_metadata, self, variant->order, copy_all);
}

/* Kills mutant 56. */
TEST_F_TIMEOUT(split, shared, TIMEOUT)
{
	split_with_children(_metadata, self, variant->order, NULL);
}

/* Pages full of zeroes are mapped to the shared one. Kills mutant 54. */
TEST_F_TIMEOUT(split, zeroes, TIMEOUT)
{
	struct area *a = &self->a;

	for (size_t i = 0; i < a->nr; i++) {
		if (!in_run(a, i))
			continue;
		memset(page_of(a, i), 0, psize());
		a->want[i] = 0;
	}
	split_with_children(_metadata, self, variant->order, NULL);
}

/* Children leave, or what they have of it, while it is split. Kills mutant 52. */
TEST_F_TIMEOUT(split, race, TIMEOUT)
{
	const struct acts zap = { { unmap, discard, leave, die } };
	struct area *a = &self->a;

	for (int round = 0; round < nr_rounds(); round++) {
		pid_t pid[MAX_ACTS];

		munmap(a->mem, a->len);
		ASSERT_TRUE(populate(a));
		start_acts(a, &zap, round % 8 * 1000, pid);
		split_to(a, variant->order);
		EXPECT_EQ(end_acts(&zap, pid), -1);
		ASSERT_EQ(bad_page(a), -1);
	}
}

/* --- THPs ----------------------------------------------------------------- */

FIXTURE(thp) {
	struct area a;
};

FIXTURE_SETUP(thp)
{
	const char *why = setup(&self->a, &by_pmd);

	if (!why && !is_counting())
		why = "migration entries are not counted";
	if (why)
		SKIP(return, "%s", why);
	ASSERT_TRUE(populate(&self->a));
}

FIXTURE_TEARDOWN(thp)
{
	if (!access(TRUSTED, W_OK))
		write_str(TRUSTED, "1");
	teardown(_metadata, &self->a, &by_pmd);
}

/*
 * A PMD's entry is split while the other one is removed: there is always one
 * that is counted. Kills mutant 53.
 */
TEST_F_TIMEOUT(thp, split_while_moved, TIMEOUT)
{
	const struct acts split = { { protect } };

	race(_metadata, &self->a, &split, 6 * nr_rounds());
	expect_quiet(_metadata, &self->a);
}

static bool discard_all(void *arg)
{
	struct area *a = arg;

	return madvise(a->mem, a->len, MADV_DONTNEED) == 0;
}

/* THPs again, in the same VMA; shorter and longer, it comes last in the tree. */
static bool renew(struct area *a)
{
	char *last = page_of(a, a->nr - 1);

	if (mprotect(last, psize(), PROT_READ) || !discard_all(a) ||
	    mprotect(last, psize(), PROT_READ | PROT_WRITE) ||
	    madvise(a->mem, a->len, MADV_HUGEPAGE))
		return false;
	for (size_t i = 0; i < a->nr; i++)
		write_page(a, i);
	return true;
}

/*
 * ... while others are asked, who have nothing: each time, the pages of the THP
 * are looked at, one after the other. Kills mutant 58.
 */
TEST_F_TIMEOUT(thp, split_while_others_are_asked, TIMEOUT)
{
	struct area *a = &self->a;
	struct family family = {};
	struct mover m;

	/* Those of its folios that are not THPs any more would be too many. */
	a->op = OP_MOVE_PAGES;
	start_children(_metadata, &family, 4 * NR_CHILDREN, a, discard_all, NULL);
	ASSERT_TRUE(start_mover(&m, a));
	for (int i = 0; i < 25 * nr_rounds(); i++) {
		ASSERT_TRUE(renew(a));
		wait_for_entry(a, part(a));
		for (int delay = 0; delay < i % 8 * 20000; delay++)
			FORCE_READ(delay);
		ASSERT_EQ(mprotect(part(a), part_len(a), PROT_READ), 0);
		EXPECT_EQ(bad_page(a), -1);
		ASSERT_EQ(mprotect(part(a), part_len(a), PROT_READ | PROT_WRITE), 0);
	}
	stop_mover(&m);
	EXPECT_TRUE(end_children(&family));
}

/* Not trusted, the count ends no walk, and none is left out. */
TEST_F_TIMEOUT(thp, trusted_or_not, TIMEOUT)
{
	struct area *a = &self->a;
	struct walks before, w;

	if (access(TRUSTED, W_OK))
		SKIP(return, "no " TRUSTED);
	for (int i = 0; i < 2; i++) {
		ASSERT_TRUE(write_str(TRUSTED, "0"));
		EXPECT_EQ(read_num(TRUSTED), 0);
		before = read_walks();
		EXPECT_GE(move_one_by_one(a), 1);
		w = walks_since(before);
		EXPECT_GE(w.all, a->nr_folios);
		EXPECT_EQ(w.full, w.all);
		EXPECT_EQ(w.stopped, 0);
		EXPECT_EQ(w.skipped, 0);
		EXPECT_EQ(bad_page(a), -1);

		ASSERT_TRUE(write_str(TRUSTED, "1"));
		EXPECT_EQ(read_num(TRUSTED), 1);
		expect_quiet(_metadata, a);
	}
}

static void *keep_switching(void *arg)
{
	atomic_bool *stop = arg;

	for (int i = 0; !*stop; i++) {
		write_str(TRUSTED, i % 2 ? "1" : "0");
		sched_yield();
	}
	return NULL;
}

/* While pages are moved, and processes leave. Kills mutant 57. */
TEST_F_TIMEOUT(thp, switched_while_moved, TIMEOUT)
{
	const struct acts acts = { { unmap, leave, copy, protect } };
	atomic_bool stop = false;
	pthread_t thread;

	if (access(TRUSTED, W_OK))
		SKIP(return, "no " TRUSTED);
	ASSERT_EQ(pthread_create(&thread, NULL, keep_switching, &stop), 0);
	race(_metadata, &self->a, &acts, nr_rounds());
	stop = true;
	pthread_join(thread, NULL);
	ASSERT_TRUE(write_str(TRUSTED, "1"));
	expect_quiet(_metadata, &self->a);
}

/*
 * Move so much memory, a THP at a time, that each slot is used: all are zero
 * again. There is a slot for 16 pages of all nodes, and neighbours are spread
 * over the table, so 1.5 pages in 16 have all slots; two are taken.
 * Kills mutants 52, 53 and 55, as it comes after their races.
 */
TEST_F_TIMEOUT(thp, no_slot_in_use, TIMEOUT)
{
	const size_t all = sysconf(_SC_PHYS_PAGES) * (size_t)psize();
	struct area *a = &self->a;
	const size_t len = all / 8 / a->size * a->size;
	struct walks before;
	char *mem;

	mem = mmap(NULL, len + a->size, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	ASSERT_NE(mem, MAP_FAILED);
	mem = (char *)(((uintptr_t)mem + a->size - 1) & -a->size);
	ASSERT_EQ(madvise(mem, len, MADV_HUGEPAGE), 0);
	ASSERT_EQ(mbind_node(mem, len, a->node[0], 0), 0);
	for (size_t i = 0; i < len; i += a->size)
		mem[i] = 1;
	before = read_walks();
	ASSERT_EQ(mbind_node(mem, len, a->node[1], MPOL_MF_MOVE_ALL), 0);
	expect_stopped(_metadata, before, len / a->size / 2);
	munmap(mem, len);
}

TEST_HARNESS_MAIN
