// SPDX-License-Identifier: GPL-2.0
/*
 * soak --seconds N [--families N] [--plant corrupt|leak|exit]
 *
 * Fork storms against migrators. Families of processes, forking three deep,
 * share memory of nine kinds and copy, unmap, move, protect, lock and drop it,
 * exit or are killed, while their pages are moved by mbind() and move_pages(),
 * by migrate_pages(), by compaction, by NUMA balancing, and while huge pages are split;
 * what the series can be told to do or not is switched on and off all the time.
 *
 * Each word of each page is known from where the page was first mapped and from
 * what was last written to it; it is compared all the time. In the end nothing
 * may be left: no process, no page, no migration entry.
 *
 * Runs as root, in the guest only: it changes settings, and does not restore
 * them. --plant makes it do wrong once, and so fail.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <linux/mempolicy.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE		25
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED	24
#endif

#define KB		1024UL
#define MB		(1024 * KB)
#define PAGE		(4 * KB)
#define HUGE		(2 * MB)
#define WORDS		(PAGE / sizeof(uint64_t))

#define MAX_FAMILIES	8
#define MAX_PAGES	(4 * MB / PAGE)
#define MAX_RUN		64	/* pages that one operation is for, at most */
/* A tree of three children each, three deep, has 1 + 3 + 9 + 27 members. */
#define DEPTH		3
#define MEMBERS		40
/* Where each member has a word of its own in pages that all can write to. */
#define OWN_WORD(m)	(WORDS - 64 + (m))
#define SAME_WORDS	(WORDS - 64)

#define HUGETLB_PER_NODE 24
#define BALANCING	"/sys/kernel/debug/sched/numa_balancing/"
#define KHUGE		"/sys/kernel/mm/transparent_hugepage/"
#define KSM		"/sys/kernel/mm/ksm/"
#define TOTAL		"/sys/kernel/debug/migration_entry_count/total"
#define SPLIT		"/sys/kernel/debug/split_huge_pages"

/* A child that got no huge page for its copy: the pool is small. */
#define EXIT_NO_HUGETLB	3

enum {
	ANON, MTHP, THP, MERGED, SHMEM, FILE_SHARED, FILE_PRIVATE,
	HUGETLB_PRIVATE, HUGETLB_SHARED, NR_KINDS
};

static const struct kind {
	const char *name;
	size_t size;
	size_t unit;		/* what can be unmapped or moved at once */
	size_t folio;		/* what often is */
	bool shared;
	int advice;
} kinds[NR_KINDS] = {
	[ANON] =	{ "anon 4K", 512 * KB, PAGE, PAGE, false, MADV_NOHUGEPAGE },
	[MTHP] =	{ "anon 64K", 1 * MB, PAGE, 64 * KB, false, MADV_HUGEPAGE },
	[THP] =		{ "anon THP", 4 * MB, PAGE, HUGE, false, MADV_HUGEPAGE },
	[MERGED] =	{ "KSM", 256 * KB, PAGE, PAGE, false, MADV_MERGEABLE },
	/* One THP, and 64K folios behind it */
	[SHMEM] =	{ "shmem", 3 * MB, PAGE, 64 * KB, true, MADV_HUGEPAGE },
	[FILE_SHARED] =	{ "file shared", 512 * KB, PAGE, PAGE, true, 0 },
	[FILE_PRIVATE] = { "file private", 512 * KB, PAGE, PAGE, false, 0 },
	[HUGETLB_PRIVATE] = { "hugetlb private", HUGE, HUGE, HUGE, false, 0 },
	[HUGETLB_SHARED] = { "hugetlb shared", HUGE, HUGE, HUGE, true, 0 },
};

enum {
	FORKS, KILLS, KILLED, NO_HUGETLB, ROUNDS, COWS, CHECKS, ZAPS, UNMAPS, FREES,
	MREMAPS, MPROTECTS, MLOCKS, COLLAPSES, MBINDS, MOVE_CALLS, MOVES, HUGETLB_MOVES,
	MIGRATE_CALLS, COMPACTIONS, SPLITS, SWITCHES, NR_COUNTERS
};

static const char *const counter_names[NR_COUNTERS] = {
	[FORKS] = "forks",
	[KILLS] = "SIGKILLs sent",
	[KILLED] = "killed by them",
	[NO_HUGETLB] = "gave up for want of a hugetlb page",
	[ROUNDS] = "rounds (a tree of workers each)",
	[COWS] = "pages written that were inherited (COW)",
	[CHECKS] = "pages compared",
	[ZAPS] = "MADV_DONTNEED",
	[UNMAPS] = "munmap()",
	[FREES] = "MADV_FREE",
	[MREMAPS] = "mremap()",
	[MPROTECTS] = "mprotect()",
	[MLOCKS] = "mlock()",
	[COLLAPSES] = "MADV_COLLAPSE",
	[MBINDS] = "mbind()",
	[MOVE_CALLS] = "move_pages()",
	[MOVES] = "  pages it found on the right node after",
	[HUGETLB_MOVES] = "  of them in hugetlb",
	[MIGRATE_CALLS] = "migrate_pages()",
	[COMPACTIONS] = "compactions",
	[SWITCHES] = "topics switched",
	[SPLITS] = "split_huge_pages that found something",
};

/* What must have happened, or this was no soak. */
static const int required[] = {
	FORKS, KILLED, COWS, ZAPS, UNMAPS, FREES, MREMAPS, MPROTECTS, MLOCKS, MBINDS,
	MOVES, HUGETLB_MOVES, MIGRATE_CALLS, COMPACTIONS, SPLITS, SWITCHES,
};

static const char *const events[] = {
	"pgfault", "pgmigrate_success", "pgmigrate_fail", "thp_migration_success",
	"thp_migration_fail", "thp_migration_split", "thp_split_page", "thp_split_pmd",
	"cow_ksm", "compact_isolated", "migration_entry_walk",
	"migration_entry_walk_stopped", "migration_entry_walk_skipped",
	"migration_entry_walk_full", "migrate_copy_threads_pages", "migrate_defer_pages",
	"numa_async_queued", "oom_kill",
};
#define NR_EVENTS (sizeof(events) / sizeof(events[0]))

/* What all processes see. */
static struct common {
	atomic_bool stop;
	atomic_int failures;
	atomic_int planted;
	atomic_long count[NR_COUNTERS];
	struct {
		atomic_int pid[MEMBERS];
		_Atomic(char *) at[NR_KINDS];
	} family[MAX_FAMILIES];
} *common;

/* What this process knows of its memory; a child has a copy. */
static struct page {
	char *at;		/* NULL: unmapped */
	uint32_t stamp;		/* what was written last; 0: nothing */
	uint16_t generation;	/* of the process that did */
	bool maybe_dropped;	/* or as if nothing had been written */
} pages[NR_KINDS][MAX_PAGES];

static int nr_families = 4;
static enum fault { NOTHING, CORRUPT, LEAK, EXIT } plant;

static int family, member, depth;
static int generation;		/* how many forks since the root */
static bool visitor;		/* has no word of its own in shared pages */
static uint32_t round_stamp;
static int touching;		/* the kind that is being accessed */
static uint64_t random_state = 88172645463325252ULL;

static void count(int counter)
{
	atomic_fetch_add(&common->count[counter], 1);
}

static bool stopped(void)
{
	return atomic_load(&common->stop);
}

__attribute__((format(printf, 1, 2)))
static void say(const char *format, ...)
{
	char line[512];
	va_list args;
	int len;

	va_start(args, format);
	len = vsnprintf(line, sizeof(line) - 1, format, args);
	va_end(args);
	line[len++] = '\n';
	if (write(STDOUT_FILENO, line, len) != len)
		_exit(1);
}

#define fail(format, ...) do {					\
	atomic_fetch_add(&common->failures, 1);			\
	atomic_store(&common->stop, true);			\
	say("soak: FAILED: " format, ##__VA_ARGS__);		\
} while (0)

static uint32_t rnd(uint32_t below)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return (random_state >> 16) % below;
}

static void seed_random(uint64_t seed)
{
	random_state = (seed + 1) * 0x9e3779b97f4a7c15ULL;
	rnd(2);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void sleep_ms(int ms)
{
	usleep(ms * 1000);
}

/* The planted fault happens once. */
static bool plant_now(enum fault what)
{
	int no = 0;

	return plant == what && atomic_compare_exchange_strong(&common->planted, &no, 1);
}

/* ---- files of the kernel ---- */

static bool put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool ok;

	if (fd < 0)
		return false;
	ok = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	close(fd);
	return ok;
}

static void must_put(const char *path, const char *text)
{
	if (!put(path, text))
		fail("cannot write %s to %s: %s", text, path, strerror(errno));
}

static size_t get(const char *path, char *buf, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	size_t len = 0;
	ssize_t n;

	while (fd >= 0 && len < size - 1 && (n = read(fd, buf + len, size - 1 - len)) > 0)
		len += n;
	if (fd >= 0)
		close(fd);
	buf[len] = 0;
	return len;
}

static long get_number(const char *path)
{
	char buf[64];

	return get(path, buf, sizeof(buf)) ? atol(buf) : -1;
}

/* -1 if there is no line of that name */
static long named(const char *path, const char *name)
{
	static char buf[64 * KB];
	size_t len = strlen(name);

	get(path, buf, sizeof(buf));
	for (char *line = buf; line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (!strncmp(line, name, len) && (line[len] == ' ' || line[len] == ':'))
			return atol(line + len + 1);
	}
	return -1;
}

static long vmstat(const char *name)
{
	return named("/proc/vmstat", name);
}

static long meminfo(const char *name)
{
	return named("/proc/meminfo", name);
}

/* ---- contents ---- */

static uint64_t seed_of(int kind, int index, uint32_t stamp)
{
	uint64_t x = stamp;

	/* Pages to be merged must be the same, between families too */
	if (kind == MERGED)
		index %= 4;
	else
		x += (uint64_t)family << 32;
	x = (x ^ ((uint64_t)(kind * MAX_PAGES + index) << 40)) * 0xbf58476d1ce4e5b9ULL;
	return (x ^ (x >> 31)) * 0x94d049bb133111ebULL | 1;
}

static uint64_t word_of(uint64_t seed, int i)
{
	return seed + i * 0x9e3779b97f4a7c15ULL;
}

static void fill(uint64_t *words, int kind, int index, uint32_t stamp)
{
	uint64_t seed = seed_of(kind, index, stamp);

	for (size_t i = 0; i < WORDS; i++)
		words[i] = word_of(seed, i);
}

/* What private memory has that nobody wrote to. */
static uint32_t first_stamp(int kind)
{
	return kind == FILE_PRIVATE ? round_stamp : 0;
}

static uint64_t content(int kind, int index, uint32_t stamp, int i)
{
	return stamp ? word_of(seed_of(kind, index, stamp), i) : 0;
}

static void report(int kind, int index, int i, uint64_t want, uint64_t is)
{
	const struct page *page = &pages[kind][index];

	fail("%s: family %d member %d pid %d: page %d at %p word %d is %#llx, not %#llx (stamp %#x round %#x%s%s)",
	     kinds[kind].name, family, member, getpid(), index, page->at, i,
	     (unsigned long long)is, (unsigned long long)want, page->stamp, round_stamp,
	     page->maybe_dropped ? ", perhaps dropped" : "",
	     page->generation != generation ? ", inherited" : "");
}

/* A visitor checks the word of its parent, which waits. */
static uint32_t own_stamp(const struct page *page)
{
	return page->generation == generation - visitor ? page->stamp : 0;
}

static bool check_shared(int kind, int index)
{
	const struct page *page = &pages[kind][index];
	volatile uint64_t *words = (volatile uint64_t *)page->at;
	uint64_t seed = seed_of(kind, index, round_stamp), is;

	for (size_t i = 0; i < SAME_WORDS; i++) {
		is = words[i];
		if (is != word_of(seed, i)) {
			report(kind, index, i, word_of(seed, i), is);
			return false;
		}
	}
	is = words[OWN_WORD(member)];
	if (is == own_stamp(page))
		return true;
	report(kind, index, OWN_WORD(member), own_stamp(page), is);
	return false;
}

static bool check_private(int kind, int index)
{
	const struct page *page = &pages[kind][index];
	volatile uint64_t *words = (volatile uint64_t *)page->at;
	uint64_t seed = seed_of(kind, index, page->stamp);

	for (size_t i = 0; i < WORDS; i++) {
		uint64_t is = words[i], want = page->stamp ? word_of(seed, i) : 0;

		if (is == want || (page->maybe_dropped &&
				   is == content(kind, index, first_stamp(kind), i)))
			continue;
		report(kind, index, i, want, is);
		return false;
	}
	return true;
}

static bool check_page(int kind, int index)
{
	if (!pages[kind][index].at)
		return true;
	touching = kind;
	count(CHECKS);
	return kinds[kind].shared ? check_shared(kind, index) : check_private(kind, index);
}

static void write_page(int kind, int index)
{
	struct page *page = &pages[kind][index];
	uint64_t *words = (uint64_t *)page->at;

	touching = kind;
	if (kinds[kind].shared) {
		if (visitor)
			return;
		page->stamp = rnd(~0U);
		page->generation = generation;
		*(volatile uint64_t *)&words[OWN_WORD(member)] = page->stamp;
		return;
	}
	page->stamp = kind == MERGED ? 1 + rnd(3) : 1 + rnd(~0U - 1);
	fill(words, kind, index, page->stamp);
	page->maybe_dropped = false;
	if (page->generation != generation)
		count(COWS);
	page->generation = generation;
}

/* ---- operations on a run of pages ---- */

struct run {
	int kind, first, nr;
	char *at;
	size_t len;
};

static int nr_pages(int kind)
{
	return kinds[kind].size / PAGE;
}

/* Some pages side by side; often a whole folio's. */
static struct run some_run(int kind)
{
	struct run run = { .kind = kind };
	int unit = (rnd(2) ? kinds[kind].folio : kinds[kind].unit) / PAGE;
	int max = unit > MAX_RUN ? unit : unit + (int)rnd(MAX_RUN);
	struct page *page;

	run.first = rnd(nr_pages(kind)) / unit * unit;
	page = &pages[kind][run.first];
	run.at = page->at;
	while (page->at && run.nr < max && run.first + run.nr < nr_pages(kind) &&
	       page[run.nr].at == page->at + run.nr * PAGE)
		run.nr++;
	run.nr = run.nr / (kinds[kind].unit / PAGE) * (kinds[kind].unit / PAGE);
	run.len = run.nr * PAGE;
	return run;
}

static struct page *page_of(const struct run *run, int i)
{
	return &pages[run->kind][run->first + i];
}

static bool is_root(void)
{
	return !member && !visitor;
}

/* A copy of hugetlb memory is 2 MB from a small pool: not for everybody. */
static bool may_write(int kind)
{
	return kind != HUGETLB_PRIVATE || is_root() || member % 8 == 1;
}

static void op_write(struct run *run)
{
	if (!may_write(run->kind))
		return;
	for (int i = 0; i < run->nr; i++)
		write_page(run->kind, run->first + i);
}

static void op_check(struct run *run)
{
	for (int i = 0; i < run->nr && check_page(run->kind, run->first + i); i++)
		;
}

static void op_munmap(struct run *run)
{
	/* Something should be left to work with */
	if (rnd(3) || munmap(run->at, run->len))
		return;
	for (int i = 0; i < run->nr; i++)
		page_of(run, i)->at = NULL;
	count(UNMAPS);
}

/* Parts of a run may be locked: then some of it is dropped, or none. */
static void dropped(struct run *run, bool surely)
{
	for (int i = 0; i < run->nr && !kinds[run->kind].shared; i++) {
		struct page *page = page_of(run, i);

		page->maybe_dropped |= !surely;
		if (!surely)
			continue;
		page->stamp = first_stamp(run->kind);
		page->generation = generation;
		page->maybe_dropped = false;
	}
}

static void op_dontneed(struct run *run)
{
	int advice = rnd(2) ? MADV_DONTNEED : MADV_DONTNEED_LOCKED;

	/* The root, who must survive, may not get another one */
	if (run->kind == HUGETLB_PRIVATE && is_root())
		return;
	dropped(run, !madvise(run->at, run->len, advice));
	count(ZAPS);
}

static void op_free(struct run *run)
{
	if (run->kind > MERGED)
		return;
	madvise(run->at, run->len, MADV_FREE);
	dropped(run, false);
	count(FREES);
}

/* One VMA at a time: if it moves several and fails, who knows which it moved. */
static char *end_of_vma(char *at)
{
	static char buf[256 * KB];
	unsigned long start, end;

	get("/proc/self/maps", buf, sizeof(buf));
	for (char *line = buf; line && *line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (sscanf(line, "%lx-%lx", &start, &end) == 2 &&
		    start <= (uintptr_t)at && (uintptr_t)at < end)
			return (char *)end;
	}
	return at;
}

/* @len of address space, at the same place between two multiples of 2 MB. */
static char *address_space(size_t len, char *like)
{
	size_t offset = (uintptr_t)like & (HUGE - 1), size = len + 2 * HUGE;
	char *space, *at;

	space = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (space == MAP_FAILED)
		return NULL;
	at = (char *)(((uintptr_t)space + HUGE - 1) & ~(HUGE - 1)) + offset;
	if (at > space)
		munmap(space, at - space);
	if (at + len < space + size)
		munmap(at + len, space + size - at - len);
	return at;
}

static void op_mremap(struct run *run)
{
	char *end, *to;

	/* mbind() of the root's other thread may split a VMA meanwhile */
	if (is_root())
		return;
	end = end_of_vma(run->at);
	if (end < run->at + run->len)
		run->nr = (end - run->at) / PAGE;
	run->len = run->nr * PAGE;
	if (!run->nr)
		return;
	/* At times so that a page table cannot be moved as it is */
	to = address_space(run->len, rnd(4) || kinds[run->kind].unit > PAGE ?
			   run->at : run->at + 16 * PAGE);
	if (!to)
		return;
	if (mremap(run->at, run->len, run->len, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to) {
		munmap(to, run->len);
		return;
	}
	for (int i = 0; i < run->nr; i++)
		page_of(run, i)->at = to + i * PAGE;
	count(MREMAPS);
}

static void op_mprotect(struct run *run)
{
	if (mprotect(run->at, run->len, PROT_READ))
		return;
	op_check(run);
	if (mprotect(run->at, run->len, PROT_READ | PROT_WRITE))
		fail("%s: mprotect() back to writable: %s", kinds[run->kind].name, strerror(errno));
	count(MPROTECTS);
}

static void op_mlock(struct run *run)
{
	/* Populates, so copies too */
	if (!may_write(run->kind))
		return;
	touching = run->kind;
	if (!mlock(run->at, run->len))
		count(MLOCKS);
	op_check(run);
	if (rnd(4))
		munlock(run->at, run->len);
}

static void op_collapse(struct run *run)
{
	if ((run->kind != THP && run->kind != SHMEM) || rnd(4))
		return;
	if (!madvise(run->at, run->len, MADV_COLLAPSE))
		count(COLLAPSES);
}

/* Preferred: a node that is full must not end in OOM. */
static void bind_to(char *at, size_t len, int node, int flags)
{
	unsigned long mask = 1UL << node;

	if (!syscall(__NR_mbind, at, len, MPOL_PREFERRED, &mask, 8 * sizeof(mask), flags))
		count(MBINDS);
}

static void op_mbind(struct run *run)
{
	bind_to(run->at, run->len, rnd(2), rnd(2) ? MPOL_MF_MOVE : MPOL_MF_MOVE_ALL);
}

static void move(int pid, int kind, char *at, int nr)
{
	void *addr[MAX_RUN];
	int node[MAX_RUN], status[MAX_RUN], to = rnd(2);

	if (kinds[kind].unit == HUGE)
		nr = 1;
	nr = nr < MAX_RUN ? nr : MAX_RUN;
	for (int i = 0; i < nr; i++) {
		addr[i] = at + i * PAGE;
		node[i] = to;
		status[i] = -1;
	}
	count(MOVE_CALLS);
	if (syscall(__NR_move_pages, pid, nr, addr, node, status, MPOL_MF_MOVE_ALL) < 0)
		return;
	for (int i = 0; i < nr; i++) {
		if (status[i] != to)
			continue;
		count(MOVES);
		if (kinds[kind].unit == HUGE)
			count(HUGETLB_MOVES);
	}
}

static void op_move(struct run *run)
{
	int pid = 0;

	/* Others have it at the same address, mostly */
	if (rnd(2))
		pid = rnd(2) ? getppid() : atomic_load(&common->family[family].pid[rnd(MEMBERS)]);
	move(pid, run->kind, run->at, run->nr);
}

static void (*const ops[])(struct run *) = {
	op_write, op_write, op_write, op_check, op_munmap, op_dontneed, op_free,
	op_mremap, op_mprotect, op_mlock, op_collapse, op_mbind, op_move,
};
#define NR_OPS (sizeof(ops) / sizeof(ops[0]))

static void some_op(void)
{
	struct run run = some_run(rnd(NR_KINDS));

	if (run.nr)
		ops[rnd(NR_OPS)](&run);
}

/* ---- workers ---- */

static void check_everything(int one_of)
{
	for (int kind = 0; kind < NR_KINDS; kind++) {
		for (int i = rnd(one_of); i < nr_pages(kind); i += one_of) {
			if (!check_page(kind, i))
				return;
		}
	}
}

static void plant_corruption(void)
{
	for (int i = 0; i < nr_pages(ANON); i++) {
		struct page *page = &pages[ANON][i];

		if (!page->at || page->maybe_dropped || !plant_now(CORRUPT))
			continue;
		((volatile uint64_t *)page->at)[77] ^= 1ULL << 40;
		say("soak: planted: word 77 of page %d, anon 4K, pid %d", i, getpid());
		check_everything(1);
		return;
	}
}

/* Is that how a worker may end? */
static void judge(int pid, int status)
{
	if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
		count(KILLED);
	else if (WIFEXITED(status) && WEXITSTATUS(status) == EXIT_NO_HUGETLB)
		count(NO_HUGETLB);
	else if (status)
		fail("worker %d of family %d ended with status %#x", pid, family, status);
}

static void reap(int pid)
{
	int status;

	if (pid <= 0)
		return;
	while (waitpid(pid, &status, 0) < 0) {
		if (errno == EINTR)
			continue;
		fail("worker %d of family %d is not to be found: %s", pid, family, strerror(errno));
		return;
	}
	judge(pid, status);
}

static void kill_worker(int pid)
{
	if (pid <= 0)
		return;
	count(KILLS);
	kill(pid, SIGKILL);
}

static void worker(uint64_t seed);

/* Counted first: who is killed cannot count. */
static int fork_worker(void)
{
	int pid;

	count(FORKS);
	pid = fork();
	if (pid < 0)
		fail("fork: %s", strerror(errno));
	if (!pid)
		generation++;
	return pid;
}

/* Writes a little, and is gone; its parent waits. */
static void visit(uint64_t seed)
{
	seed_random(seed);
	visitor = true;
	for (int i = rnd(4); i; i--)
		some_op();
	if (!rnd(4))
		kill_worker(getpid());
	_exit(0);
}

static void fork_visitors(void)
{
	uint64_t seed = random_state;
	int pid[4], nr = 1 + rnd(4);

	for (int i = 0; i < nr; i++) {
		pid[i] = fork_worker();
		if (!pid[i])
			visit(seed + i);
	}
	for (int i = 0; i < nr; i++) {
		if (!rnd(6))
			kill_worker(pid[i]);
	}
	for (int i = 0; i < nr; i++)
		reap(pid[i]);
}

static void become(int new_member)
{
	member = new_member;
	depth++;
	atomic_store(&common->family[family].pid[member], getpid());
}

static int fork_children(int *pid)
{
	uint64_t seed = random_state;
	int nr = depth == DEPTH || stopped() ? 0 : 1 + rnd(3);

	for (int i = 0; i < nr; i++) {
		pid[i] = fork_worker();
		if (!pid[i]) {
			become(member * 3 + 1 + i);
			worker(seed + i);
		}
	}
	return nr;
}

static void live(void)
{
	int pid[3], nr = fork_children(pid);

	for (int i = 12 + rnd(24); i && !stopped(); i--) {
		some_op();
		if (!rnd(6))
			fork_visitors();
		if (nr && !rnd(40))
			kill_worker(pid[rnd(nr)]);
	}
	while (nr--)
		reap(pid[nr]);
}

static void worker(uint64_t seed)
{
	seed_random(seed);
	live();
	check_everything(stopped() ? 8 : 1 + rnd(3));
	plant_corruption();
	if (plant_now(EXIT))
		_exit(7);
	if (!rnd(8))
		kill_worker(getpid());
	_exit(0);
}

/* ---- a family ---- */

static int shmem_fd, file_fd, hugetlb_fd;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	(void)context;
	if (touching == HUGETLB_PRIVATE && !is_root())
		_exit(EXIT_NO_HUGETLB);
	fail("signal %d at %p: family %d member %d touched %s", sig, info->si_addr,
	     family, member, kinds[touching].name);
	_exit(1);
}

static int flags_of(int kind)
{
	switch (kind) {
	case SHMEM:
	case FILE_SHARED:
	case HUGETLB_SHARED:
		return MAP_SHARED;
	case FILE_PRIVATE:
		return MAP_PRIVATE;
	case HUGETLB_PRIVATE:
		return MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB;
	default:
		return MAP_PRIVATE | MAP_ANONYMOUS;
	}
}

static int fd_of(int kind)
{
	switch (kind) {
	case SHMEM:		return shmem_fd;
	case FILE_SHARED:
	case FILE_PRIVATE:	return file_fd;
	case HUGETLB_SHARED:	return hugetlb_fd;
	default:		return -1;
	}
}

static size_t offset_of(int kind)
{
	return kind == FILE_PRIVATE ? kinds[FILE_SHARED].size : 0;
}

/* The private mapping's part of the file is written by other means. */
static void write_file(void)
{
	uint64_t words[WORDS];

	for (int i = 0; i < nr_pages(FILE_PRIVATE); i++) {
		fill(words, FILE_PRIVATE, i, round_stamp);
		if (pwrite(file_fd, words, PAGE, offset_of(FILE_PRIVATE) + i * PAGE) != PAGE)
			fail("cannot write the file: %s", strerror(errno));
	}
}

static void fill_shared(int kind)
{
	for (int i = 0; i < nr_pages(kind); i++) {
		uint64_t *words = (uint64_t *)pages[kind][i].at;

		fill(words, kind, i, round_stamp);
		memset(words + SAME_WORDS, 0, PAGE - SAME_WORDS * sizeof(*words));
	}
}

/* Beside others there is a hole: no merging, no huge page over both. */
static char *map_kind(int kind)
{
	const struct kind *k = &kinds[kind];
	char *at = address_space(k->size + HUGE, NULL);

	if (!at)
		return NULL;
	if (mmap(at, k->size, PROT_READ | PROT_WRITE, MAP_FIXED | flags_of(kind),
		 fd_of(kind), offset_of(kind)) == MAP_FAILED) {
		munmap(at, k->size + HUGE);
		return NULL;
	}
	munmap(at + k->size, HUGE);
	if (k->advice)
		madvise(at, k->size, k->advice);
	return at;
}

static void start_kind(int kind)
{
	char *at = map_kind(kind);

	/* Other families may have all of the pool just now */
	if (!at && kinds[kind].unit != HUGE)
		fail("cannot map %s: %s", kinds[kind].name, strerror(errno));
	atomic_store(&common->family[family].at[kind], at);
	for (int i = 0; i < nr_pages(kind); i++)
		pages[kind][i] = (struct page) {
			.at = at ? at + i * PAGE : NULL,
			.stamp = kinds[kind].shared ? 0 : first_stamp(kind),
		};
	if (!at)
		return;
	touching = kind;
	if (kinds[kind].shared)
		fill_shared(kind);
	for (int i = 0; i < nr_pages(kind); i++)
		write_page(kind, i);
}

static void end_kind(int kind)
{
	for (int i = 0; i < nr_pages(kind); i += kinds[kind].unit / PAGE) {
		if (pages[kind][i].at)
			munmap(pages[kind][i].at, kinds[kind].unit);
	}
}

/* Orphans of those that were killed come to the root. */
static void reap_orphans(void)
{
	int pid, status;

	while ((pid = waitpid(-1, &status, 0)) > 0 || errno == EINTR) {
		if (pid > 0)
			judge(pid, status);
	}
}

static void one_round(void)
{
	round_stamp++;
	write_file();
	for (int kind = 0; kind < NR_KINDS; kind++)
		start_kind(kind);
	live();
	reap_orphans();
	check_everything(1);
	for (int kind = 0; kind < NR_KINDS; kind++)
		end_kind(kind);
	count(ROUNDS);
}

/* The family's pages that the root has too, moved by itself, as it forks. */
static void *binder(void *unused)
{
	(void)unused;
	while (!stopped()) {
		int kind = rand() % NR_KINDS;
		char *at = atomic_load(&common->family[family].at[kind]);

		if (at)
			bind_to(at, kinds[kind].size, rand() % 2, MPOL_MF_MOVE_ALL);
		sleep_ms(5);
	}
	return NULL;
}

static void open_files(void)
{
	const char *dir = getenv("MIGRATE_TEST_DIR");
	char path[256];

	snprintf(path, sizeof(path), "%s/soak.%d", dir ? dir : "/tmp", family);
	file_fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	shmem_fd = memfd_create("soak", 0);
	hugetlb_fd = memfd_create("soak", MFD_HUGETLB);
	if (file_fd < 0 || shmem_fd < 0 || hugetlb_fd < 0 ||
	    ftruncate(file_fd, offset_of(FILE_PRIVATE) + kinds[FILE_PRIVATE].size) ||
	    ftruncate(shmem_fd, kinds[SHMEM].size) ||
	    ftruncate(hugetlb_fd, kinds[HUGETLB_SHARED].size))
		fail("cannot make the files: %s", strerror(errno));
}

static int be_family(int number)
{
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	pthread_t thread;

	family = number;
	seed_random(now() * 1000 + number);
	round_stamp = rnd(1 << 30);
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	open_files();
	atomic_store(&common->family[family].pid[0], getpid());
	if (pthread_create(&thread, NULL, binder, NULL))
		fail("no thread: %s", strerror(errno));
	while (!stopped())
		one_round();
	pthread_join(thread, NULL);
	return 0;
}

/* ---- migrators ---- */

static int somebody(int *of_family)
{
	*of_family = rnd(nr_families);
	for (int i = 0; i < 10; i++) {
		int pid = atomic_load(&common->family[*of_family].pid[rnd(MEMBERS)]);

		if (pid && !kill(pid, 0))
			return pid;
	}
	return 0;
}

static void mover(void)
{
	int kind = rnd(NR_KINDS), f, pid = somebody(&f);
	char *at = atomic_load(&common->family[f].at[kind]);
	int unit = kinds[kind].folio / PAGE;

	if (pid && at) {
		int first = rnd(nr_pages(kind)) / unit * unit;
		int left = kinds[kind].folio == HUGE ? 1 : nr_pages(kind) - first;

		move(pid, kind, at + first * PAGE, left);
	}
	sleep_ms(1);
}

static void page_migrator(void)
{
	unsigned long from = 1UL << rnd(2), to = 3 - from;
	int f, pid = somebody(&f);

	if (pid && syscall(__NR_migrate_pages, pid, 8 * sizeof(from), &from, &to) >= 0)
		count(MIGRATE_CALLS);
	sleep_ms(10);
}

static void compactor(void)
{
	if (put("/proc/sys/vm/compact_memory", "1"))
		count(COMPACTIONS);
	sleep_ms(200);
}

static void splitter(void)
{
	static const int huge[] = { MTHP, THP, SHMEM };
	int kind = huge[rnd(3)], f, pid = somebody(&f);
	char *at = atomic_load(&common->family[f].at[kind]), command[128];

	if (pid && at) {
		snprintf(command, sizeof(command), "%d,0x%lx,0x%lx,%d", pid,
			 (unsigned long)at, (unsigned long)at + kinds[kind].size, rnd(2) ? 0 : 2);
		if (put(SPLIT, command))
			count(SPLITS);
	}
	sleep_ms(20);
}

/* What the series has switches for; a kernel may lack any of them. */
static const struct {
	const char *path, *values[4];
} switches[] = {
	{ "/sys/kernel/mm/migrate_copy/engine", { "threads", "dma", "off", "threads" } },
	{ "/sys/kernel/mm/migrate_copy/bulk", { "1", "1", "0", "1" } },
	{ "/sys/kernel/mm/migrate_defer/enabled", { "1", "1", "0", "1" } },
	{ "/proc/sys/kernel/numa_balancing_async", { "1", "1", "0", "1" } },
	{ "/proc/sys/kernel/numa_balancing", { "1", "1", "1", "0" } },
};

static void switcher(void)
{
	const int which = rnd(sizeof(switches) / sizeof(switches[0]));

	if (put(switches[which].path, switches[which].values[rnd(4)]))
		count(SWITCHES);
	sleep_ms(200);
}

static void (*const migrators[])(void) = {
	mover, mover, page_migrator, compactor, splitter, switcher,
};
#define NR_MIGRATORS ((int)(sizeof(migrators) / sizeof(migrators[0])))

static int be_migrator(int number)
{
	seed_random(now() * 1000 + 100 + number);
	while (!stopped())
		migrators[number]();
	return 0;
}

/* ---- the first process ---- */

struct state {
	long events[NR_EVENTS];
	long memory;		/* kB that are free, or known to be in use by whom */
	long mlocked;
};

static double start, phase_end;
static int servants[MAX_FAMILIES + NR_MIGRATORS];	/* each with a group of its own */
static long least_free = -1;

static void settings(void)
{
	must_put(KHUGE "enabled", "madvise");
	must_put(KHUGE "shmem_enabled", "advise");
	must_put(KHUGE "hugepages-2048kB/enabled", "inherit");
	must_put(KHUGE "hugepages-2048kB/shmem_enabled", "inherit");
	must_put(KHUGE "hugepages-64kB/enabled", "madvise");
	must_put(KHUGE "hugepages-64kB/shmem_enabled", "advise");
	must_put(KHUGE "khugepaged/scan_sleep_millisecs", "500");
	must_put(KSM "sleep_millisecs", "20");
	must_put(KSM "pages_to_scan", "500");
	must_put(KSM "run", "1");
	put("/sys/kernel/mm/migrate_copy/reasons", "all");
	put(BALANCING "scan_delay_ms", "10");
	put(BALANCING "scan_period_min_ms", "50");
	put(BALANCING "scan_period_max_ms", "200");
	for (int node = 0; node < 2; node++) {
		char path[128], number[16];

		snprintf(path, sizeof(path),
			 "/sys/devices/system/node/node%d/hugepages/hugepages-2048kB/nr_hugepages", node);
		snprintf(number, sizeof(number), "%d", HUGETLB_PER_NODE);
		must_put(path, number);
	}
}

/* Merged pages are no longer, and nothing scans. */
static void calm(void)
{
	put(KSM "run", "2");
	put(KSM "run", "0");
	put("/proc/sys/kernel/numa_balancing", "0");
	put("/proc/sys/kernel/numa_balancing_async", "0");
	put("/sys/kernel/mm/migrate_defer/enabled", "0");
	put("/sys/kernel/mm/migrate_copy/engine", "off");
	sync();
	put("/proc/sys/vm/drop_caches", "3");
	/* Folios on their way to the LRU lists arrive there */
	put("/proc/sys/vm/compact_memory", "1");
	sleep_ms(1000);
}

/* Free pages that CPUs keep for themselves are not in MemFree: tens of MB. */
static long percpu_lists(void)
{
	static char buf[256 * KB];
	long nr = 0;

	get("/proc/zoneinfo", buf, sizeof(buf));
	for (char *at = buf; (at = strstr(at, " count: ")); at++)
		nr += atol(at + strlen(" count: "));
	return nr * (PAGE / KB);
}

static struct state read_state(void)
{
	static const char *const used[] = {
		"MemFree", "Buffers", "Cached", "Slab", "KernelStack", "PageTables", "Percpu", "Hugetlb",
	};
	struct state state = { .mlocked = vmstat("nr_mlock"), .memory = percpu_lists() };

	for (size_t i = 0; i < NR_EVENTS; i++)
		state.events[i] = vmstat(events[i]);
	for (size_t i = 0; i < sizeof(used) / sizeof(used[0]); i++)
		state.memory += meminfo(used[i]) > 0 ? meminfo(used[i]) : 0;
	/* In Cached, but nobody's once the soak has ended */
	state.memory -= meminfo("Shmem");
	return state;
}

static void servant(int number)
{
	int pid = fork();

	if (pid < 0)
		fail("fork: %s", strerror(errno));
	if (!pid) {
		setpgid(0, 0);
		_exit(number < nr_families ? be_family(number) : be_migrator(number - nr_families));
	}
	servants[number] = pid;
}

static long counted(int counter)
{
	return atomic_load(&common->count[counter]);
}

static void progress(void)
{
	int elapsed = now() - start;
	long free = meminfo("MemAvailable") / 1024;

	if (least_free < 0 || free < least_free)
		least_free = free;
	say("soak: %d:%02d: %ld rounds, %ld forks, %ld copied, %ld moved, %ld migrated, %ld walks, %ld entries, %ld MB available",
	    elapsed / 60, elapsed % 60, counted(ROUNDS), counted(FORKS), counted(COWS), counted(MOVES),
	    vmstat("pgmigrate_success"), vmstat("migration_entry_walk"), get_number(TOTAL), free);
}

/* True when all have ended. */
static bool reap_servants(void)
{
	int pid, status;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		int i = 0;

		while (i < nr_families + NR_MIGRATORS && servants[i] != pid)
			i++;
		if (i == nr_families + NR_MIGRATORS) {
			judge(pid, status);
			continue;
		}
		if (status || !stopped())
			fail("%s %d ended with status %#x",
			     i < nr_families ? "family" : "migrator", i, status);
	}
	return pid < 0 && errno == ECHILD;
}

static void kill_all(void)
{
	fail("workers that do not stop are killed");
	for (int i = 0; i < nr_families + NR_MIGRATORS; i++)
		kill(-servants[i], SIGKILL);
	while (waitpid(-1, NULL, 0) > 0)
		;
}

static void run_phase(double seconds)
{
	double next = now() + 10;

	atomic_store(&common->stop, atomic_load(&common->failures) != 0);
	memset(common->family, 0, sizeof(common->family));
	phase_end = now() + seconds;
	for (int i = 0; i < nr_families + NR_MIGRATORS; i++)
		servant(i);
	while (now() < phase_end && !stopped()) {
		sleep_ms(100);
		reap_servants();
		if (now() >= next) {
			progress();
			next += 10;
		}
	}
	atomic_store(&common->stop, true);
	/* Hung tasks are noticed by the kernel; this is for those that loop */
	for (double end = now() + 400; !reap_servants(); sleep_ms(50)) {
		if (now() > end) {
			kill_all();
			return;
		}
	}
}

static void expect(bool ok, const char *what, long is, long ought)
{
	say("soak: %-6s %s: %ld (%s %ld)", ok ? "ok" : "FAILED", what, is, ok ? "of" : "not", ought);
	if (!ok)
		atomic_fetch_add(&common->failures, 1);
}

/* Kernel threads may still be at it. */
static long settled(const char *path, const char *name, long ought)
{
	long is = -1;

	for (int i = 0; i < 50; i++) {
		is = name ? named(path, name) : get_number(path);
		if (is == ought)
			break;
		sleep_ms(100);
	}
	return is;
}

static void expect_settled(const char *what, const char *path, const char *name, long ought)
{
	long is = settled(path, name, ought);

	/* -1: this kernel does not have it */
	if (is == -1)
		say("soak: -      %s: this kernel does not say", what);
	else
		expect(is == ought, what, is, ought);
}

/* Whatever was queued for NUMA balancing has become of something. */
static void check_hints(void)
{
	static const char *const fates[] = {
		"numa_async_migrated", "numa_async_failed", "numa_async_stale",
		"numa_async_expired", "numa_async_not_isolated",
	};
	long done = 0;

	if (vmstat("numa_async_queued") < 0)
		return;
	for (size_t i = 0; i < sizeof(fates) / sizeof(fates[0]); i++)
		done += vmstat(fates[i]);
	expect(done == vmstat("numa_async_queued"), "NUMA hints done with", done,
	       vmstat("numa_async_queued"));
}

static void check_walks(void)
{
	long walks, stops, full;

	for (int i = 0; i < 50; i++) {
		walks = vmstat("migration_entry_walk");
		stops = vmstat("migration_entry_walk_stopped");
		full = vmstat("migration_entry_walk_full");
		if (walks < 0 || full < 0) {
			say("soak: -      walks: this kernel does not count all of them");
			return;
		}
		if (walks == stops + full)
			break;
		sleep_ms(100);
	}
	expect(walks == stops + full, "walks are stopped or full", stops + full, walks);
}

static void check_nothing_left(const struct state *before, const struct state *after)
{
	const char *mem = "/proc/meminfo", *vm = "/proc/vmstat";
	long slack = 8 * 1024, lost = before->memory - after->memory;

	expect_settled("migration entries left", TOTAL, NULL, 0);
	check_walks();
	check_hints();
	expect_settled("pages held for flushes", vm, "nr_migrate_deferred", 0);
	expect(lost <= slack, "kB that nobody has any more, at most", lost, slack);
	expect_settled("hugetlb pages free", mem, "HugePages_Free", meminfo("HugePages_Total"));
	expect_settled("hugetlb pages reserved", mem, "HugePages_Rsvd", 0);
	expect_settled("hugetlb pages surplus", mem, "HugePages_Surp", 0);
	expect_settled("pages mlocked", vm, "nr_mlock", before->mlocked);
	expect_settled("anonymous pages isolated", vm, "nr_isolated_anon", 0);
	expect_settled("file pages isolated", vm, "nr_isolated_file", 0);
	expect(after->events[NR_EVENTS - 1] == before->events[NR_EVENTS - 1], "processes killed by OOM",
	       after->events[NR_EVENTS - 1] - before->events[NR_EVENTS - 1], 0);
	expect(counted(KILLED) <= counted(KILLS), "workers killed, by us", counted(KILLED), counted(KILLS));
}

static void table(const struct state *before, const struct state *after)
{
	long deepest = get_number("/sys/kernel/debug/migration_entry_count/deepest");

	say("soak: %.0f s, %d families, at least %ld MB were available", now() - start,
	    nr_families, least_free);
	for (int i = 0; i < NR_COUNTERS; i++)
		say("soak:   %-40s %12ld", counter_names[i], counted(i));
	for (size_t i = 0; i < NR_EVENTS; i++) {
		if (after->events[i] >= 0)
			say("soak:   %-40s %12ld", events[i], after->events[i] - before->events[i]);
	}
	if (deepest >= 0)
		say("soak:   %-40s %12ld", "entries of one page at most", deepest);
}

static void check_work(void)
{
	for (size_t i = 0; i < sizeof(required) / sizeof(required[0]); i++) {
		if (!counted(required[i]))
			fail("never happened: %s", counter_names[required[i]]);
	}
}

static void plant_leak(void)
{
	int fd;

	if (!plant_now(LEAK))
		return;
	fd = memfd_create("leak", 0);
	if (fd < 0 || ftruncate(fd, 32 * MB) || fallocate(fd, 0, 0, 32 * MB))
		fail("cannot leak: %s", strerror(errno));
	say("soak: planted: 32 MB leaked");
}

static int soak(int seconds)
{
	struct state first, before, after;
	double warm = seconds > 120 ? 20 : seconds / 6.0;

	start = now();
	settings();
	first = read_state();
	/* Caches of all sorts fill up once; what leaks goes on leaking. */
	run_phase(warm);
	calm();
	before = read_state();
	must_put(KSM "run", "1");
	plant_leak();
	run_phase(seconds - warm);
	progress();
	calm();
	after = read_state();
	table(&first, &after);
	check_nothing_left(&before, &after);
	if (!atomic_load(&common->failures))
		check_work();
	say("soak: %s", atomic_load(&common->failures) ? "FAILED" : "passed");
	return atomic_load(&common->failures) != 0;
}

static void usage(void)
{
	say("usage: soak --seconds N [--families N] [--plant corrupt|leak|exit]");
	exit(2);
}

int main(int argc, char **argv)
{
	static const char *const plants[] = { "", "corrupt", "leak", "exit" };
	int seconds = 0;

	for (int i = 1; i < argc; i += 2) {
		if (i + 1 == argc)
			usage();
		if (!strcmp(argv[i], "--seconds"))
			seconds = atoi(argv[i + 1]);
		else if (!strcmp(argv[i], "--families"))
			nr_families = atoi(argv[i + 1]);
		else if (!strcmp(argv[i], "--plant"))
			for (plant = EXIT; plant && strcmp(argv[i + 1], plants[plant]);)
				plant--;
		else
			usage();
		if (!strcmp(argv[i], "--plant") && !plant)
			usage();
	}
	if (seconds < 6 || nr_families < 1 || nr_families > MAX_FAMILIES)
		usage();
	common = mmap(NULL, sizeof(*common), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (common == MAP_FAILED)
		exit(2);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	return soak(seconds);
}
