// SPDX-License-Identifier: GPL-2.0
/*
 * Migrating memory keeps what is in it, whatever the memory and whatever the
 * means of migration.
 *
 * Every word of every page is compared. What a word holds depends on its place
 * and on the round, so that a page which was not copied differs even when the
 * destination is a recycled page of an earlier round. Memory goes to and fro
 * between two nodes: a folio with a leaked reference moves once, and never
 * again. The kernel's own account (/proc/vmstat) has to agree to the page. A
 * writer on another CPU looks for lost writes. Dirty and soft-dirty state has
 * to survive.
 *
 * The accounts are those of the whole machine. main() therefore switches off
 * what migrates memory on its own (NUMA balancing, proactive compaction and
 * demotion), and khugepaged, which would collapse what a move has split. If the
 * counters say that somebody else migrated all the same, the move is repeated.
 *
 * Comments "Kills mutant N" name the deliberate bugs which a test was shown to
 * notice: 1 only the first 64 bytes of a folio copied, 2 one folio in 16 not
 * copied, 3 TLB flush dropped, 4 last 64 bytes of a folio lost, 5 PTE dirty bit
 * not passed on to the folio by unmapping, 6 success over-counted, 7 reference
 * to the destination leaked, 10 dirty bit not restored to the PTE, 11 dirty
 * flag not passed on to the new folio, 12 soft-dirty bit lost.
 */

#define _GNU_SOURCE
#include "kselftest_harness.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/magic.h>
#include <linux/mempolicy.h>
#include <linux/types.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>
#include "vm_util.h"
#include "hugepage_settings.h"

/* A bit more than the kernel puts into one batch (512), in whole mTHPs. */
#define NR_BASE_PAGES		528
#define NR_THPS			2
#define MTHP_SIZE		(64UL << 10)
#define NR_COMPACTION_PAGES	4096
#define NR_REFRESHES		16

#define MAX_THP_AREA		(64UL << 20)

/* Moves of an area, half of them in each direction. */
#define NR_ROUNDS		4

/* With a writer, a move counts if it wrote that often to all pages meanwhile. */
#define SWEEPS_PER_MOVE		2
#define WRITER_MAX_ROUNDS	200

/* How often to repeat what others disturbed. */
#define MAX_ATTEMPTS		5

#define TIMEOUT_SEC		60

#define NODE_BITS		1024
#define NODE_LONGS		(NODE_BITS / (8 * sizeof(unsigned long)))

enum kind {
	ANON,
	SHMEM,
	LOCAL_FILE,
	LARGE_FILE,	/* as LOCAL_FILE, with large folios */
	PMD_THP,
	MTHP,
};

enum means {
	MBIND,
	MOVE_PAGES,
	MIGRATE_PAGES,
};

/* What is migrated, and all it takes to look at it. */
struct area {
	enum kind kind;
	int fd;			/* of the file, -1 for anonymous memory */
	char *start;
	size_t len;
	size_t folio_size;	/* that page faults shall allocate */
	size_t nr_pages;
	size_t page_words;
	bool *hole;		/* for each page: is it none of ours? */

	int nodes[2];
	bool shared;		/* with another process: needs MOVE_ALL */
	bool busy;		/* a fault may hold a folio, which stays then */
	long nr_stuck;		/* pages elsewhere migrate_pages() cannot move */

	/* As find_folios() saw them last. */
	size_t nr_folios;
	size_t nr_thps;
	void **folios;		/* first address of each */
	size_t *folio_pages;

	/* Scratch, touched in advance. */
	void **pages;		/* address of each page */
	int *targets;
	int *status;
	__u64 *entries;	/* of pagemap */
	__u64 *flags;	/* of kpageflags */
	__u64 *copy;		/* of the area */

	int pagemap_fd;
	int kpageflags_fd;
	int mem_fd;
};

/* ------------------------------------------------------------------ */
/* System calls for which there is no wrapper without libnuma. */

struct node_set {
	unsigned long bits[NODE_LONGS];
};

static struct node_set one_node(int node)
{
	struct node_set set = {};
	const int bits = 8 * sizeof(unsigned long);

	set.bits[node / bits] = 1UL << (node % bits);
	return set;
}

static bool has_node(const struct node_set *set, int node)
{
	const int bits = 8 * sizeof(unsigned long);

	return set->bits[node / bits] & (1UL << (node % bits));
}

static long sys_mbind(void *addr, size_t len, int mode, int node,
		      unsigned int flags)
{
	struct node_set set = one_node(node);

	return syscall(__NR_mbind, addr, len, mode, set.bits, NODE_BITS, flags);
}

static long sys_set_mempolicy(int mode, int node)
{
	struct node_set set = one_node(node);

	if (mode == MPOL_DEFAULT)
		return syscall(__NR_set_mempolicy, mode, NULL, 0);
	return syscall(__NR_set_mempolicy, mode, set.bits, NODE_BITS);
}

static long sys_allowed_nodes(struct node_set *set)
{
	return syscall(__NR_get_mempolicy, NULL, set->bits, NODE_BITS, NULL,
		       MPOL_F_MEMS_ALLOWED);
}

static long sys_move_pages(size_t nr, void **pages, const int *nodes,
			   int *status, int flags)
{
	return syscall(__NR_move_pages, 0, nr, pages, nodes, status, flags);
}

static long sys_migrate_pages(int from, int to)
{
	struct node_set old = one_node(from);
	struct node_set new = one_node(to);

	return syscall(__NR_migrate_pages, 0, NODE_BITS, old.bits, new.bits);
}

/* ------------------------------------------------------------------ */
/* Settings: nobody else shall migrate, and no CPU keep free pages. */

static struct setting {
	const char *path;
	const char *quiet;
	char saved[64];
} settings[] = {
	{ .path = "/proc/sys/kernel/numa_balancing", .quiet = "0" },
	{ .path = "/proc/sys/vm/compaction_proactiveness", .quiet = "0" },
	{ .path = "/sys/kernel/mm/numa/demotion_enabled", .quiet = "0" },
	/* As few as can be: what CPUs keep to themselves is no hole. */
	{ .path = "/proc/sys/vm/percpu_pagelist_high_fraction",
	  .quiet = "100000" },
};

static pid_t main_pid;

static bool set(const char *path, const char *value)
{
	const ssize_t len = strlen(value);
	ssize_t written;
	int fd;

	fd = open(path, O_WRONLY);
	if (fd < 0)
		return false;
	written = write(fd, value, len);
	close(fd);
	return written == len;
}

static void restore_settings(void)
{
	size_t i;

	/* exit() in a child is no reason to end the quiet. */
	if (getpid() != main_pid)
		return;

	for (i = 0; i < ARRAY_SIZE(settings); i++)
		if (settings[i].saved[0])
			set(settings[i].path, settings[i].saved);
}

/*
 * No page fault shall allocate large folios unless a test asks for it, and
 * khugepaged shall stop: it does when there is no size left to collapse to.
 */
static void no_large_folios(void)
{
	struct thp_settings thp;
	int i;

	thp_save_settings();
	thp_read_settings(&thp);
	thp.thp_enabled = THP_MADVISE;
	thp.thp_defrag = THP_DEFRAG_MADVISE;
	thp.shmem_enabled = SHMEM_NEVER;
	for (i = 0; i < NR_ORDERS; i++) {
		thp.hugepages[i].enabled = THP_NEVER;
		thp.shmem_hugepages[i].enabled = SHMEM_NEVER;
	}
	thp_write_settings(&thp);
}

/* What does not exist cannot disturb. */
static void save_settings_and_be_quiet(void)
{
	size_t i;

	main_pid = getpid();
	if (!geteuid() && thp_available())
		no_large_folios();
	atexit(restore_settings);

	for (i = 0; i < ARRAY_SIZE(settings); i++) {
		struct setting *s = &settings[i];

		if (read_file(s->path, s->saved, sizeof(s->saved)))
			set(s->path, s->quiet);
	}
}

/* May page faults in a MADV_HUGEPAGE area allocate folios of @size? */
static void allow_large_folios(size_t size, bool allow)
{
	char name[64];

	snprintf(name, sizeof(name), "hugepages-%zukB/enabled", size >> 10);
	thp_write_string(name, allow ? "madvise" : "never");
}

/* ------------------------------------------------------------------ */
/* The kernel's account. */

struct counters {
	long success;
	long fail;
	long thp_success;
	long thp_fail;
	long thp_split;
	long others;	/* grows when somebody else migrates */
};

static long counter(const char *vmstat, const char *name)
{
	const size_t len = strlen(name);
	const char *line;

	for (line = vmstat; line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (!strncmp(line, name, len) && line[len] == ' ')
			return strtol(line + len, NULL, 10);
	}
	return 0;
}

static void read_counters(struct __test_metadata *_metadata, struct counters *c)
{
	static char vmstat[32 << 10];
	size_t len = 0;
	ssize_t ret;
	int fd;

	fd = open("/proc/vmstat", O_RDONLY);
	ASSERT_GE(fd, 0);
	while ((ret = read(fd, vmstat + len, sizeof(vmstat) - 1 - len)) > 0)
		len += ret;
	ASSERT_EQ(ret, 0);
	ASSERT_LT(len, sizeof(vmstat) - 1);
	vmstat[len] = '\0';
	close(fd);

	*c = (struct counters) {
		.success = counter(vmstat, "pgmigrate_success"),
		.fail = counter(vmstat, "pgmigrate_fail"),
		.thp_success = counter(vmstat, "thp_migration_success"),
		.thp_fail = counter(vmstat, "thp_migration_fail"),
		.thp_split = counter(vmstat, "thp_migration_split"),
		.others = counter(vmstat, "compact_migrate_scanned") +
			  counter(vmstat, "numa_pages_migrated") +
			  counter(vmstat, "pgdemote_kswapd") +
			  counter(vmstat, "pgdemote_direct") +
			  counter(vmstat, "pgdemote_khugepaged") +
			  counter(vmstat, "pgdemote_proactive"),
	};
}

/* ------------------------------------------------------------------ */
/* Patterns. */

/* What word @idx of an area holds in @round. */
static __u64 pattern(size_t idx, unsigned int round)
{
	return (idx + 1) * 0x9e3779b97f4a7c15ULL ^
	       (round + 1) * 0xc2b2ae3d27d4eb4fULL;
}

/* The word of @page that belongs to the writer, if there is one. */
static size_t writer_word(const struct area *a, size_t page)
{
	return page * a->page_words + page * 37 % a->page_words;
}

static void fill_page(struct area *a, size_t page, unsigned int round,
		      bool writer)
{
	__u64 *words = (__u64 *)a->start;
	const size_t first = page * a->page_words;
	const size_t spare = writer_word(a, page);
	size_t i;

	for (i = first; i < first + a->page_words; i++)
		if (!writer || i != spare)
			words[i] = pattern(i, round);
}

static void fill(struct area *a, unsigned int round, bool writer)
{
	size_t page;

	for (page = 0; page < a->nr_pages; page++)
		if (!a->hole[page])
			fill_page(a, page, round, writer);
}

/* Is @page of @words, a view of the area, as fill_page() left it? */
static bool page_is(const struct area *a, const __u64 *words, size_t page,
		    unsigned int round, bool writer)
{
	const size_t first = page * a->page_words;
	const size_t spare = writer_word(a, page);
	size_t i;

	for (i = first; i < first + a->page_words; i++) {
		if (words[i] == pattern(i, round) || (writer && i == spare))
			continue;
		ksft_print_msg("round %u: page %zu of %zu, word %zu: %llx, not %llx\n",
			       round, page, a->nr_pages, i - first,
			       (unsigned long long)words[i],
			       (unsigned long long)pattern(i, round));
		return false;
	}
	return true;
}

static bool area_is(const struct area *a, const void *view, unsigned int round,
		    bool writer)
{
	size_t page;

	for (page = 0; page < a->nr_pages; page++)
		if (!a->hole[page] && !page_is(a, view, page, round, writer))
			return false;
	return true;
}

/*
 * Copy the area as the page tables have it, whatever the TLBs of this and other
 * CPUs believe.
 */
static const __u64 *copy_by_page_tables(struct __test_metadata *_metadata,
					struct area *a)
{
	ASSERT_EQ(pread(a->mem_fd, a->copy, a->len, (uintptr_t)a->start),
		  (ssize_t)a->len);
	return a->copy;
}

/* ------------------------------------------------------------------ */
/* Areas. */

static bool is_private(const struct area *a)
{
	return a->kind == ANON || a->kind == PMD_THP || a->kind == MTHP;
}

static bool is_file(const struct area *a)
{
	return a->kind == LOCAL_FILE || a->kind == LARGE_FILE;
}

static void read_pagemap(struct __test_metadata *_metadata, struct area *a)
{
	const size_t size = a->nr_pages * sizeof(__u64);
	const off_t pos = (uintptr_t)a->start / psize() * sizeof(__u64);

	ASSERT_EQ(pread(a->pagemap_fd, a->entries, size, pos), (ssize_t)size);
}

/*
 * Find the folios of the area. move_pages() wants one address of each: with
 * two it finds the folio isolated already, by itself, and says -EBUSY.
 */
static void find_folios(struct __test_metadata *_metadata, struct area *a)
{
	const size_t thp_pages = read_pmd_pagesize() / psize();
	size_t i, run;

	read_pagemap(_metadata, a);
	for (i = 0; i < a->nr_pages; i += run) {
		const __u64 pfn = PAGEMAP_PFN(a->entries[i]);
		ssize_t size;

		ASSERT_TRUE(a->entries[i] & PM_PRESENT);
		for (run = 1; i + run < a->nr_pages; run++)
			if (PAGEMAP_PFN(a->entries[i + run]) != pfn + run)
				break;

		size = run * sizeof(__u64);
		ASSERT_EQ(pread(a->kpageflags_fd, a->flags + i, size,
				pfn * sizeof(__u64)), size);
	}

	ASSERT_FALSE(a->flags[0] & KPF_COMPOUND_TAIL);
	a->nr_folios = 0;
	for (i = 0; i < a->nr_pages; i++) {
		if (!(a->flags[i] & KPF_COMPOUND_TAIL)) {
			a->folios[a->nr_folios] = a->pages[i];
			a->folio_pages[a->nr_folios++] = 0;
		}
		a->folio_pages[a->nr_folios - 1]++;
	}

	a->nr_thps = 0;
	for (i = 0; i < a->nr_folios; i++)
		a->nr_thps += thp_pages && a->folio_pages[i] == thp_pages;
}

static size_t nr_folios_of(const struct area *a, size_t nr_pages)
{
	size_t i, nr = 0;

	for (i = 0; i < a->nr_folios; i++)
		nr += a->folio_pages[i] == nr_pages;
	return nr;
}

/* Make the file of an area; false if the test is to be skipped. */
static bool create_file(struct __test_metadata *_metadata, struct area *a)
{
	const char *dir = getenv("MIGRATE_TEST_DIR") ?: ".";
	char path[PATH_MAX];
	struct statfs fs;

	if (a->kind == SHMEM) {
		a->fd = memfd_create("migrate_contents", 0);
		ASSERT_GE(a->fd, 0);
	} else {
		snprintf(path, sizeof(path), "%s/migrate_contents_XXXXXX", dir);
		a->fd = mkstemp(path);
		if (a->fd < 0)
			SKIP(return false, "MIGRATE_TEST_DIR %s: %s", dir,
			     strerror(errno));
		unlink(path);

		ASSERT_EQ(fstatfs(a->fd, &fs), 0);
		if (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC)
			SKIP(return false, "MIGRATE_TEST_DIR %s: no disk file system",
			     dir);
	}

	ASSERT_EQ(ftruncate(a->fd, a->len), 0);
	return true;
}

static void *alloc_touched(struct __test_metadata *_metadata, size_t size)
{
	void *mem = malloc(size);

	ASSERT_NE(mem, NULL);
	memset(mem, 1, size);
	return mem;
}

/*
 * migrate_pages() takes everything a process has. All of that, not only the
 * area, shall be there before a move, so that only the area is moved by it.
 */
static void populate_process(struct __test_metadata *_metadata,
			     enum means by)
{
	const int err = by == MIGRATE_PAGES ? mlockall(MCL_CURRENT) : 0;

	ASSERT_EQ(err, 0);
}

static void alloc_scratch(struct __test_metadata *_metadata, struct area *a)
{
	const size_t nr = a->nr_pages;
	size_t i;

	a->folios = alloc_touched(_metadata, nr * sizeof(*a->folios));
	a->folio_pages = alloc_touched(_metadata, nr * sizeof(*a->folio_pages));
	a->pages = alloc_touched(_metadata, nr * sizeof(*a->pages));
	a->targets = alloc_touched(_metadata, nr * sizeof(*a->targets));
	a->status = alloc_touched(_metadata, nr * sizeof(*a->status));
	a->entries = alloc_touched(_metadata, nr * sizeof(*a->entries));
	a->flags = alloc_touched(_metadata, nr * sizeof(*a->flags));
	a->copy = alloc_touched(_metadata, a->len);
	a->hole = alloc_touched(_metadata, nr * sizeof(*a->hole));
	memset(a->hole, false, nr * sizeof(*a->hole));
	for (i = 0; i < nr; i++)
		a->pages[i] = a->start + i * psize();
}

/* The two nodes to move between; false if the test is to be skipped. */
static bool find_nodes(struct __test_metadata *_metadata, struct area *a)
{
	struct node_set allowed = {};
	int node, nr = 0;

	if (sys_allowed_nodes(&allowed))
		SKIP(return false, "no NUMA: %s", strerror(errno));

	for (node = 0; node < NODE_BITS && nr < 2; node++)
		if (has_node(&allowed, node))
			a->nodes[nr++] = node;
	if (nr < 2)
		SKIP(return false, "needs two nodes with memory");
	return true;
}

/* Have all pages present. */
static void populate(struct __test_metadata *_metadata, struct area *a)
{
	size_t i;

	/* A large write() is what makes file systems allocate large folios. */
	if (a->kind == LARGE_FILE) {
		const ssize_t ret = pwrite(a->fd, a->copy, a->len, 0);

		ASSERT_EQ(ret, (ssize_t)a->len);
	}
	if (a->folio_size > psize())
		allow_large_folios(a->folio_size, true);
	for (i = 0; i < a->nr_pages; i++)
		*(__u64 *)(a->start + i * psize()) = 0;
	if (a->folio_size > psize())
		allow_large_folios(a->folio_size, false);
}

/* Open what shows where pages are; false if the test is to be skipped. */
static bool open_proc_files(struct __test_metadata *_metadata, struct area *a)
{
	if (geteuid())
		SKIP(return false, "needs root, to see page frame numbers");

	a->pagemap_fd = open("/proc/self/pagemap", O_RDONLY);
	a->mem_fd = open("/proc/self/mem", O_RDONLY);
	a->kpageflags_fd = open("/proc/kpageflags", O_RDONLY);
	if (a->pagemap_fd < 0 || a->mem_fd < 0 || a->kpageflags_fd < 0)
		SKIP(return false, "needs pagemap, mem and kpageflags in /proc");
	return true;
}

/* Map as much, at a multiple of @align, and nothing next to it. */
static char *map_aligned(struct __test_metadata *_metadata, size_t len,
			 size_t align, int flags, int fd)
{
	char *map, *start;

	map = mmap(NULL, len + 2 * align, PROT_NONE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(map, MAP_FAILED);
	start = map + align - (uintptr_t)map % align;
	ASSERT_EQ(mmap(start, len, PROT_READ | PROT_WRITE, flags | MAP_FIXED,
		       fd, 0), start);
	return start;
}

/* Map the area; false if the test is to be skipped. */
static bool map_area(struct __test_metadata *_metadata, struct area *a,
		     size_t nr_pages)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS;

	a->page_words = psize() / sizeof(__u64);
	a->nr_pages = nr_pages;
	a->len = nr_pages * psize();
	a->fd = -1;

	if (!is_private(a)) {
		if (!create_file(_metadata, a))
			return false;
		flags = MAP_SHARED;
	}
	a->start = map_aligned(_metadata, a->len, a->folio_size, flags, a->fd);

	/* Without THP in the kernel there is nothing to advise against. */
	madvise(a->start, a->len,
		a->folio_size > psize() ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	/* Readahead would make large folios. */
	if (is_file(a))
		madvise(a->start, a->len, MADV_RANDOM);
	return true;
}

/*
 * Make an area of @kind with at least @nr_pages pages, all of them present;
 * false if the test is to be skipped.
 */
static bool create_area(struct __test_metadata *_metadata, struct area *a,
			enum kind kind, enum means by, size_t nr_pages)
{
	const size_t thp_size = read_pmd_pagesize();
	size_t folio_pages = 1;

	a->kind = kind;
	if (!open_proc_files(_metadata, a) || !find_nodes(_metadata, a))
		return false;

	if (kind == PMD_THP) {
		if (!thp_size || NR_THPS * thp_size > MAX_THP_AREA)
			SKIP(return false, "no THP, or too large: %zu bytes",
			     thp_size);
		folio_pages = thp_size / psize();
		nr_pages = NR_THPS * folio_pages;
	} else if (kind == MTHP) {
		folio_pages = MTHP_SIZE / psize();
		if (folio_pages < 2 ||
		    !(thp_supported_orders() & folio_pages))
			SKIP(return false, "no folios of %lu bytes", MTHP_SIZE);
	}
	a->folio_size = folio_pages * psize();

	populate_process(_metadata, by);
	if (!map_area(_metadata, a, nr_pages))
		return false;
	alloc_scratch(_metadata, a);
	populate(_metadata, a);

	/* Is it what it is meant to be? */
	find_folios(_metadata, a);
	if (kind == LARGE_FILE) {
		if (nr_folios_of(a, 1) == a->nr_folios)
			SKIP(return false, "no large folios in MIGRATE_TEST_DIR");
	} else if (nr_folios_of(a, folio_pages) != a->nr_folios) {
		SKIP(return false, "folios of %zu pages were not to be had",
		     folio_pages);
	}
	return true;
}

/* ------------------------------------------------------------------ */
/* Moving. */

static void assert_on_node(struct __test_metadata *_metadata, struct area *a,
			   int node)
{
	size_t i, nr_elsewhere = 0;

	ASSERT_EQ(sys_move_pages(a->nr_pages, a->pages, NULL, a->status, 0), 0);
	for (i = 0; i < a->nr_pages; i++)
		nr_elsewhere += a->status[i] != node;
	ASSERT_EQ(nr_elsewhere, 0) {
		TH_LOG("%zu of %zu pages are not on node %d", nr_elsewhere,
		       a->nr_pages, node);
	}
}

static long move_by_move_pages(struct area *a, int node)
{
	size_t i;

	for (i = 0; i < a->nr_folios; i++)
		a->targets[i] = node;
	return sys_move_pages(a->nr_folios, a->folios, a->targets, a->status,
			      a->shared ? MPOL_MF_MOVE_ALL : MPOL_MF_MOVE);
}

/* As move() with MIGRATE_PAGES means three moves, less of them will do. */
static unsigned int nr_rounds(enum means by)
{
	return by == MIGRATE_PAGES ? NR_ROUNDS / 2 : NR_ROUNDS;
}

/* Move the area to @node without a look at the counters. */
static void put_on_node(struct __test_metadata *_metadata, struct area *a,
			int node)
{
	int attempt = 0;
	long ret;

	do {
		find_folios(_metadata, a);
		ret = move_by_move_pages(a, node);
	} while (ret && a->busy && ++attempt < MAX_ATTEMPTS);
	ASSERT_EQ(ret, 0);
	assert_on_node(_metadata, a, node);
}

/*
 * Bring all the process has to node @to, but for the area: that goes back to
 * node @from. What is allocated from now on is allocated on node @to. Some pages
 * of the vDSO may be on node @from for good.
 */
static void leave_area_behind(struct __test_metadata *_metadata,
			      struct area *a, int from, int to)
{
	ASSERT_EQ(sys_set_mempolicy(MPOL_BIND, to), 0);
	ASSERT_GE(sys_migrate_pages(from, to), 0);
	a->nr_stuck = sys_migrate_pages(from, to);
	ASSERT_GE(a->nr_stuck, 0);
	put_on_node(_metadata, a, from);
}

static long move_by_means(struct area *a, enum means by, int from, int to)
{
	const int flags = a->shared ? MPOL_MF_MOVE_ALL : MPOL_MF_MOVE;

	switch (by) {
	case MBIND:
		return sys_mbind(a->start, a->len, MPOL_BIND, to,
				 flags | MPOL_MF_STRICT);
	case MOVE_PAGES:
		return move_by_move_pages(a, to);
	default:
		return sys_migrate_pages(from, to) - a->nr_stuck;
	}
}

/*
 * Move the area from one node to the other and hold the kernel's account
 * against what was moved.
 */
static void move(struct __test_metadata *_metadata, struct area *a,
		 enum means by, int from, int to)
{
	struct counters old, new;
	int attempt;
	long ret;

	for (attempt = 0; attempt < MAX_ATTEMPTS; attempt++) {
		if (attempt)
			put_on_node(_metadata, a, from);
		if (by == MIGRATE_PAGES)
			leave_area_behind(_metadata, a, from, to);
		find_folios(_metadata, a);

		read_counters(_metadata, &old);
		ret = move_by_means(a, by, from, to);
		read_counters(_metadata, &new);

		ASSERT_EQ(sys_set_mempolicy(MPOL_DEFAULT, 0), 0);
		if (ret && a->busy) {
			ksft_print_msg("not all could be moved: once more\n");
			continue;
		}
		ASSERT_EQ(ret, 0);
		assert_on_node(_metadata, a, to);

		if (new.others == old.others)
			break;
		ksft_print_msg("somebody else migrated, too: once more\n");
	}
	ASSERT_LT(attempt, MAX_ATTEMPTS);

	ASSERT_EQ(new.success - old.success, (long)a->nr_pages);
	ASSERT_EQ(new.fail - old.fail, 0);
	ASSERT_EQ(new.thp_success - old.thp_success, (long)a->nr_thps);
	if (a->kind == PMD_THP) {
		ASSERT_EQ(new.thp_fail - old.thp_fail, 0);
		ASSERT_EQ(new.thp_split - old.thp_split, 0);
		ASSERT_TRUE(check_huge_anon(a->start, a->len, NR_THPS,
					    read_pmd_pagesize()));
	}
}

/* ------------------------------------------------------------------ */
/* The writer: a thread on another CPU which never stops writing. */

struct writer {
	struct area *a;
	pthread_t thread;
	int cpu;
	cpu_set_t allowed;	/* CPUs of the thread that started it */
	sem_t started;
	bool stop;
	__u64 sweeps;	/* full ones: all its words hold at least that */
	__u64 writes;
	__u64 lost;		/* writes it did not find again */
};

static void *write_and_look(void *arg)
{
	struct writer *w = arg;
	struct area *a = w->a;
	__u64 *words = (__u64 *)a->start;
	__u64 sweep, seen, lost = 0;
	size_t page;

	sem_post(&w->started);
	for (sweep = 1; !__atomic_load_n(&w->stop, __ATOMIC_ACQUIRE); sweep++) {
		for (page = 0; page < a->nr_pages; page++) {
			__u64 *word = words + writer_word(a, page);

			if (a->hole[page])
				continue;
			seen = __atomic_load_n(word, __ATOMIC_RELAXED);
			lost += seen != sweep - 1;
			__atomic_store_n(word, sweep, __ATOMIC_RELEASE);
			__atomic_store_n(&w->writes, w->writes + 1,
					 __ATOMIC_RELAXED);
		}
		__atomic_store_n(&w->sweeps, sweep, __ATOMIC_RELEASE);
		__atomic_store_n(&w->lost, lost, __ATOMIC_RELEASE);
		/* The memory may be somebody else's: leave it alone. */
		if (lost)
			break;
	}
	return NULL;
}

/* Run this thread and the writer apart; false if the test is to be skipped. */
static bool start_writer(struct __test_metadata *_metadata, struct writer *w,
			 struct area *a)
{
	const int nr_cpus = CPU_SETSIZE;
	pthread_attr_t attr;
	cpu_set_t one;
	size_t page;
	int first;

	ASSERT_EQ(sched_getaffinity(0, sizeof(w->allowed), &w->allowed), 0);
	if (CPU_COUNT(&w->allowed) < 2)
		SKIP(return false, "needs two CPUs");
	for (first = 0; !CPU_ISSET(first, &w->allowed); first++)
		;
	for (w->cpu = nr_cpus - 1; !CPU_ISSET(w->cpu, &w->allowed); w->cpu--)
		;

	CPU_ZERO(&one);
	CPU_SET(first, &one);
	ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);

	for (page = 0; page < a->nr_pages; page++)
		if (!a->hole[page])
			((__u64 *)a->start)[writer_word(a, page)] = 0;

	w->a = a;
	a->busy = true;
	ASSERT_EQ(sem_init(&w->started, 0, 0), 0);
	CPU_ZERO(&one);
	CPU_SET(w->cpu, &one);
	ASSERT_EQ(pthread_attr_init(&attr), 0);
	ASSERT_EQ(pthread_attr_setaffinity_np(&attr, sizeof(one), &one), 0);
	ASSERT_EQ(pthread_create(&w->thread, &attr, write_and_look, w), 0);
	ASSERT_EQ(sem_wait(&w->started), 0);
	return true;
}

/*
 * Words of the writer only grow, and the page tables lead to what it wrote. A
 * CPU with a stale TLB would agree with itself until the next flush.
 */
static bool writes_are_there(const struct area *a, const __u64 *words,
			     __u64 min, __u64 max)
{
	size_t page, nr_bad = 0;

	for (page = 0; page < a->nr_pages; page++) {
		const __u64 seen = words[writer_word(a, page)];

		if (a->hole[page] || (seen >= min && seen <= max))
			continue;
		if (!nr_bad++)
			ksft_print_msg("page %zu: writer's word is %llu, not %llu to %llu\n",
				       page, (unsigned long long)seen,
				       (unsigned long long)min,
				       (unsigned long long)max);
	}
	if (nr_bad)
		ksft_print_msg("such pages: %zu of %zu\n", nr_bad, a->nr_pages);
	return !nr_bad;
}

static __u64 nr_sweeps(const struct writer *w)
{
	return __atomic_load_n(&w->sweeps, __ATOMIC_ACQUIRE);
}

/* See whether all is well while the writer goes on. */
static void look_after_writer(struct __test_metadata *_metadata,
			      struct writer *w, unsigned int round)
{
	const __u64 *words;
	__u64 min, max;
	bool well;

	min = nr_sweeps(w);
	words = copy_by_page_tables(_metadata, w->a);
	max = nr_sweeps(w) + 1;

	well = writes_are_there(w->a, words, min, max);
	if (!well)
		__atomic_store_n(&w->stop, true, __ATOMIC_RELEASE);
	ASSERT_TRUE(well);
	ASSERT_TRUE(area_is(w->a, words, round, true));
	ASSERT_EQ(__atomic_load_n(&w->lost, __ATOMIC_ACQUIRE), 0);
}

static void stop_writer(struct __test_metadata *_metadata, struct writer *w,
			unsigned int round)
{
	const __u64 *words;

	__atomic_store_n(&w->stop, true, __ATOMIC_RELEASE);
	ASSERT_EQ(pthread_join(w->thread, NULL), 0);
	ASSERT_EQ(sched_setaffinity(0, sizeof(w->allowed), &w->allowed), 0);
	w->a->busy = false;
	ASSERT_EQ(w->lost, 0);

	words = copy_by_page_tables(_metadata, w->a);
	ASSERT_TRUE(writes_are_there(w->a, words, w->sweeps, w->sweeps));
	ASSERT_TRUE(area_is(w->a, words, round, true));
}

static __u64 nr_writes(const struct writer *w)
{
	return __atomic_load_n(&w->writes, __ATOMIC_ACQUIRE);
}

/* ------------------------------------------------------------------ */
/* The other process, which does as it is told. */

enum order {
	LOOK,	/* is it the pattern of the round? */
	WRITE,	/* the pattern of the round */
	LEAVE,
};

struct message {
	enum order order;
	unsigned int round;
	bool good;
};

static void obey(struct area *a, int fd)
{
	struct message m;

	while (read(fd, &m, sizeof(m)) == sizeof(m) && m.order != LEAVE) {
		m.good = true;
		if (m.order == WRITE)
			fill(a, m.round, false);
		else
			m.good = area_is(a, a->start, m.round, false);
		if (write(fd, &m, sizeof(m)) != sizeof(m))
			break;
	}
	_exit(0);
}

static pid_t start_child(struct __test_metadata *_metadata, struct area *a,
			 int *fd)
{
	int fds[2];
	pid_t pid;

	ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fds), 0);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		close(fds[0]);
		obey(a, fds[1]);
	}
	close(fds[1]);
	*fd = fds[0];
	return pid;
}

static bool tell(struct __test_metadata *_metadata, int fd, enum order order,
		 unsigned int round)
{
	struct message m = { .order = order, .round = round };

	ASSERT_EQ(write(fd, &m, sizeof(m)), sizeof(m));
	if (order == LEAVE)
		return true;
	ASSERT_EQ(read(fd, &m, sizeof(m)), sizeof(m));
	return m.good;
}

/* ------------------------------------------------------------------ */

FIXTURE(migrate_contents)
{
	struct area area;
};

FIXTURE_VARIANT(migrate_contents)
{
	enum kind kind;
	enum means by;
};

FIXTURE_VARIANT_ADD(migrate_contents, anon_mbind)
{
	.kind = ANON,
	.by = MBIND,
};

FIXTURE_VARIANT_ADD(migrate_contents, anon_move_pages)
{
	.kind = ANON,
	.by = MOVE_PAGES,
};

FIXTURE_VARIANT_ADD(migrate_contents, anon_migrate_pages)
{
	.kind = ANON,
	.by = MIGRATE_PAGES,
};

FIXTURE_VARIANT_ADD(migrate_contents, shmem_mbind)
{
	.kind = SHMEM,
	.by = MBIND,
};

FIXTURE_VARIANT_ADD(migrate_contents, shmem_move_pages)
{
	.kind = SHMEM,
	.by = MOVE_PAGES,
};

FIXTURE_VARIANT_ADD(migrate_contents, shmem_migrate_pages)
{
	.kind = SHMEM,
	.by = MIGRATE_PAGES,
};

FIXTURE_VARIANT_ADD(migrate_contents, file_mbind)
{
	.kind = LOCAL_FILE,
	.by = MBIND,
};

FIXTURE_VARIANT_ADD(migrate_contents, file_move_pages)
{
	.kind = LOCAL_FILE,
	.by = MOVE_PAGES,
};

FIXTURE_VARIANT_ADD(migrate_contents, file_migrate_pages)
{
	.kind = LOCAL_FILE,
	.by = MIGRATE_PAGES,
};

FIXTURE_VARIANT_ADD(migrate_contents, large_file_mbind)
{
	.kind = LARGE_FILE,
	.by = MBIND,
};

FIXTURE_VARIANT_ADD(migrate_contents, large_file_move_pages)
{
	.kind = LARGE_FILE,
	.by = MOVE_PAGES,
};

FIXTURE_VARIANT_ADD(migrate_contents, large_file_migrate_pages)
{
	.kind = LARGE_FILE,
	.by = MIGRATE_PAGES,
};

FIXTURE_VARIANT_ADD(migrate_contents, thp_mbind)
{
	.kind = PMD_THP,
	.by = MBIND,
};

FIXTURE_VARIANT_ADD(migrate_contents, thp_move_pages)
{
	.kind = PMD_THP,
	.by = MOVE_PAGES,
};

FIXTURE_VARIANT_ADD(migrate_contents, thp_migrate_pages)
{
	.kind = PMD_THP,
	.by = MIGRATE_PAGES,
};

FIXTURE_VARIANT_ADD(migrate_contents, mthp_mbind)
{
	.kind = MTHP,
	.by = MBIND,
};

FIXTURE_VARIANT_ADD(migrate_contents, mthp_move_pages)
{
	.kind = MTHP,
	.by = MOVE_PAGES,
};

FIXTURE_VARIANT_ADD(migrate_contents, mthp_migrate_pages)
{
	.kind = MTHP,
	.by = MIGRATE_PAGES,
};

FIXTURE_SETUP(migrate_contents)
{
	struct area *a = &self->area;

	if (!create_area(_metadata, a, variant->kind, variant->by,
			 NR_BASE_PAGES))
		return;
	put_on_node(_metadata, a, a->nodes[0]);
}

FIXTURE_TEARDOWN(migrate_contents)
{
	/* The process ends here; its writer, if it has one, still runs. */
}

/*
 * To and fro, and nothing else going on. Kills mutants 1, 2 and 4 by contents, 6
 * by the counters, 7 by pages that stay behind.
 */
TEST_F_TIMEOUT(migrate_contents, quiet, TIMEOUT_SEC)
{
	struct area *a = &self->area;
	unsigned int round;

	for (round = 1; round <= nr_rounds(variant->by); round++) {
		fill(a, round, false);
		move(_metadata, a, variant->by, a->nodes[(round + 1) % 2],
		     a->nodes[round % 2]);
		ASSERT_TRUE(area_is(a, a->start, round, false));
	}
}

/*
 * The same while another CPU writes to every page: what it writes between
 * unmapping and remapping must not go to the old page. Kills mutant 3.
 */
TEST_F_TIMEOUT(migrate_contents, writer, TIMEOUT_SEC)
{
	struct area *a = &self->area;
	struct writer writer = {};
	unsigned int round, nr_moves = 0;

	if (!start_writer(_metadata, &writer, a))
		return;

	for (round = 1; round <= WRITER_MAX_ROUNDS; round++) {
		__u64 old;

		fill(a, round, true);
		old = nr_sweeps(&writer);
		move(_metadata, a, variant->by, a->nodes[(round + 1) % 2],
		     a->nodes[round % 2]);
		nr_moves += nr_sweeps(&writer) >= old + SWEEPS_PER_MOVE;
		look_after_writer(_metadata, &writer, round);
		if (nr_moves >= nr_rounds(variant->by))
			break;
	}
	ASSERT_LE(round, WRITER_MAX_ROUNDS) {
		TH_LOG("The writer on CPU %d did %llu sweeps only", writer.cpu,
		       (unsigned long long)writer.sweeps);
	}
	stop_writer(_metadata, &writer, round);
}

/*
 * Two processes map the memory, and both must find it after a move. Then the
 * child writes: private memory is copied to it by that, and must be the old one
 * still for the parent, here and on the way back; what is shared is seen by
 * both.
 */
TEST_F_TIMEOUT(migrate_contents, forked, TIMEOUT_SEC)
{
	struct area *a = &self->area;
	unsigned int round;

	a->shared = true;
	for (round = 1; round <= nr_rounds(variant->by) / 2; round++) {
		const unsigned int written = NR_ROUNDS + round;
		const unsigned int mine = is_private(a) ? round : written;
		int status, fd;
		pid_t pid;

		fill(a, round, false);
		pid = start_child(_metadata, a, &fd);

		move(_metadata, a, variant->by, a->nodes[0], a->nodes[1]);
		ASSERT_TRUE(area_is(a, a->start, round, false));
		ASSERT_TRUE(tell(_metadata, fd, LOOK, round));

		ASSERT_TRUE(tell(_metadata, fd, WRITE, written));
		ASSERT_TRUE(area_is(a, a->start, mine, false));

		move(_metadata, a, variant->by, a->nodes[1], a->nodes[0]);
		ASSERT_TRUE(area_is(a, a->start, mine, false));
		ASSERT_TRUE(tell(_metadata, fd, LOOK, written));

		tell(_metadata, fd, LEAVE, 0);
		ASSERT_EQ(waitpid(pid, &status, 0), pid);
		ASSERT_EQ(status, 0);
		close(fd);
	}
}

/*
 * Pages are soft-dirty after migration if, and only if, they were before. In a
 * folio mapped by PTEs every other page is. A dirty PMD may come back soft-dirty
 * on some architectures, see remove_migration_pmd(): that loses nothing. Kills
 * mutant 12.
 */
TEST_F_TIMEOUT(migrate_contents, soft_dirty, TIMEOUT_SEC)
{
	struct area *a = &self->area;
	const size_t grain = a->kind == PMD_THP ?
			     read_pmd_pagesize() / psize() : 1;
	unsigned int round;
	bool good = true;
	size_t page;

	if (!softdirty_supported())
		SKIP(return, "no soft-dirty tracking");

	fill(a, 0, false);
	clear_softdirty();
	for (page = grain; page < a->nr_pages; page += 2 * grain)
		fill_page(a, page, 1, false);

	for (round = 0; round <= nr_rounds(variant->by) / 2; round++) {
		if (round)
			move(_metadata, a, variant->by,
			     a->nodes[(round + 1) % 2], a->nodes[round % 2]);

		read_pagemap(_metadata, a);
		for (page = 0; page < a->nr_pages; page++) {
			const bool dirty = a->entries[page] & PM_SOFT_DIRTY;

			if (dirty && round && a->kind == PMD_THP)
				continue;
			ASSERT_EQ(dirty, page / grain % 2) {
				TH_LOG("page %zu after %u moves", page, round);
			}
		}
	}

	for (page = 0; page < a->nr_pages; page++)
		good &= page_is(a, (__u64 *)a->start, page,
				page % (2 * grain) == grain, false);
	ASSERT_TRUE(good);
}

/* ------------------------------------------------------------------ */
/*
 * That a page is dirty is known to the page tables or to the folio or to both.
 * Whoever knows when migration starts, what was written must not be taken for
 * clean and be dropped afterwards.
 */

FIXTURE(migrate_dirty)
{
	struct area area;
};

FIXTURE_VARIANT(migrate_dirty)
{
	enum means by;
};

FIXTURE_VARIANT_ADD(migrate_dirty, mbind)
{
	.by = MBIND,
};

FIXTURE_VARIANT_ADD(migrate_dirty, move_pages)
{
	.by = MOVE_PAGES,
};

FIXTURE_VARIANT_ADD(migrate_dirty, migrate_pages)
{
	.by = MIGRATE_PAGES,
};

FIXTURE_SETUP(migrate_dirty)
{
}

FIXTURE_TEARDOWN(migrate_dirty)
{
}

/* There and back. */
static void move_twice(struct __test_metadata *_metadata, struct area *a,
		       enum means by)
{
	move(_metadata, a, by, a->nodes[0], a->nodes[1]);
	move(_metadata, a, by, a->nodes[1], a->nodes[0]);
}

/*
 * Of the even pages, which were written to, none may be lost; of the odd ones,
 * which were not, some must be gone, or this is no proof.
 */
static void reclaim_and_look(struct __test_metadata *_metadata, struct area *a)
{
	unsigned char *resident = (unsigned char *)a->flags;
	size_t page, nr_gone = 0, nr_lost = 0;

	ASSERT_EQ(madvise(a->start, a->len, MADV_PAGEOUT), 0);

	read_pagemap(_metadata, a);
	ASSERT_EQ(mincore(a->start, a->len, resident), 0);
	for (page = 1; page < a->nr_pages; page += 2)
		nr_gone += !(a->entries[page] & PM_PRESENT) && !resident[page];
	ASSERT_GT(nr_gone, 0);

	for (page = 0; page < a->nr_pages && !nr_lost; page += 2)
		nr_lost += !page_is(a, (__u64 *)a->start, page, 1, false);
	ASSERT_EQ(nr_lost, 0);
}

/*
 * Lazily freed memory that was written to again: only the PTE is dirty, and a
 * clean page would be dropped. Kills mutant 5.
 */
TEST_F_TIMEOUT(migrate_dirty, lazyfree, TIMEOUT_SEC)
{
	struct area *a = &self->area;
	size_t page;

	if (!create_area(_metadata, a, ANON, variant->by, NR_BASE_PAGES))
		return;

	/* This brings pages to the LRU lists, too: only there they count. */
	put_on_node(_metadata, a, a->nodes[0]);
	fill(a, 0, false);
	ASSERT_EQ(madvise(a->start, a->len, MADV_FREE), 0);
	for (page = 0; page < a->nr_pages; page += 2)
		fill_page(a, page, 1, false);

	move_twice(_metadata, a, variant->by);
	reclaim_and_look(_metadata, a);
}

/*
 * Shared memory that was read first and written to later, without a fault: only
 * the PTE is dirty, and a clean page would be dropped, as it was a hole. Kills
 * mutant 5.
 */
TEST_F_TIMEOUT(migrate_dirty, shmem, TIMEOUT_SEC)
{
	struct area *a = &self->area;
	size_t page;

	if (!create_area(_metadata, a, SHMEM, variant->by, NR_BASE_PAGES))
		return;

	/* Holes again, and then pages which nobody wrote to. */
	ASSERT_EQ(fallocate(a->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			    0, a->len), 0);
	force_read_pages(a->start, a->nr_pages, psize());
	put_on_node(_metadata, a, a->nodes[0]);
	for (page = 0; page < a->nr_pages; page += 2)
		fill_page(a, page, 1, false);

	move_twice(_metadata, a, variant->by);
	reclaim_and_look(_metadata, a);
}

/* Write back, forget, and read the file from the disk. */
static void reread_file(struct __test_metadata *_metadata, struct area *a)
{
	unsigned char *resident = (unsigned char *)a->flags;
	size_t page, nr_resident = 0;

	ASSERT_EQ(fsync(a->fd), 0);
	ASSERT_EQ(madvise(a->start, a->len, MADV_DONTNEED), 0);
	ASSERT_EQ(posix_fadvise(a->fd, 0, 0, POSIX_FADV_DONTNEED), 0);

	ASSERT_EQ(mincore(a->start, a->len, resident), 0);
	for (page = 0; page < a->nr_pages; page++)
		nr_resident += resident[page] & 1;
	ASSERT_EQ(nr_resident, 0);

	ASSERT_EQ(pread(a->fd, a->copy, a->len, 0), (ssize_t)a->len);
}

static void write_back(struct __test_metadata *_metadata, struct area *a,
		       enum kind kind, enum means by)
{
	size_t page, nr_lost = 0;

	if (!create_area(_metadata, a, kind, by, NR_BASE_PAGES))
		return;

	fill(a, 0, false);
	put_on_node(_metadata, a, a->nodes[0]);
	ASSERT_EQ(fsync(a->fd), 0);

	/* All clean now. Two in three get dirty again. */
	for (page = 0; page < a->nr_pages; page++)
		if (page % 3)
			fill_page(a, page, 1, false);
	move_twice(_metadata, a, by);

	reread_file(_metadata, a);
	for (page = 0; page < a->nr_pages && !nr_lost; page++)
		nr_lost += !page_is(a, a->copy, page, page % 3 != 0, false);
	ASSERT_EQ(nr_lost, 0);
}

/* What was written to a file gets to the disk. Kills mutant 11. */
TEST_F_TIMEOUT(migrate_dirty, written_back, TIMEOUT_SEC)
{
	write_back(_metadata, &self->area, LOCAL_FILE, variant->by);
}

TEST_F_TIMEOUT(migrate_dirty, written_back_large, TIMEOUT_SEC)
{
	write_back(_metadata, &self->area, LARGE_FILE, variant->by);
}

/* How many faults does it take to write again to what was made read-only? */
static long nr_faults_of_rewriting(struct __test_metadata *_metadata,
				   struct area *a, unsigned int round)
{
	struct rusage old, new;
	size_t page;

	ASSERT_EQ(mprotect(a->start, a->len, PROT_READ), 0);
	ASSERT_EQ(mprotect(a->start, a->len, PROT_READ | PROT_WRITE), 0);

	ASSERT_EQ(getrusage(RUSAGE_THREAD, &old), 0);
	for (page = 0; page < a->nr_pages; page++)
		fill_page(a, page, round, false);
	ASSERT_EQ(getrusage(RUSAGE_THREAD, &new), 0);
	return new.ru_minflt - old.ru_minflt;
}

/*
 * A dirty PTE is dirty again when it is restored. No data depends on it, as the
 * folio is dirty too by then. But mprotect() makes dirty PTEs of a shared file
 * mapping writable at once, and leaves clean ones to a fault. Writeback in
 * between cleans PTEs, too: hence the attempts. Kills mutant 10.
 */
TEST_F_TIMEOUT(migrate_dirty, pte, TIMEOUT_SEC)
{
	struct area *a = &self->area;
	long nr_usual, nr_faults;
	int attempt;

	if (!create_area(_metadata, a, LOCAL_FILE, variant->by, NR_BASE_PAGES))
		return;

	put_on_node(_metadata, a, a->nodes[0]);
	fill(a, 0, false);
	for (attempt = 0; attempt < MAX_ATTEMPTS; attempt++) {
		nr_usual = nr_faults_of_rewriting(_metadata, a, 1);
		if (nr_usual == a->nr_pages)
			SKIP(return, "mprotect() leaves dirty PTEs to faults");

		move_twice(_metadata, a, variant->by);
		nr_faults = nr_faults_of_rewriting(_metadata, a, 2);
		ASSERT_TRUE(area_is(a, a->start, 2, false));
		if (nr_faults <= nr_usual)
			break;
	}
	ASSERT_LE(nr_faults, nr_usual);
}

/* ------------------------------------------------------------------ */
/*
 * Compaction chooses for itself what to migrate and where to. It moves pages
 * from the lower end of a zone into holes at its upper end; so an area with
 * holes is drawn together. THPs are of no use here: compaction leaves alone what
 * is as large as a pageblock.
 */

FIXTURE(migrate_compaction)
{
	struct area area;
};

FIXTURE_VARIANT(migrate_compaction)
{
	enum kind kind;
	bool may_stay;		/* moving nothing at all is no failure */
};

FIXTURE_VARIANT_ADD(migrate_compaction, anon)
{
	.kind = ANON,
};

FIXTURE_VARIANT_ADD(migrate_compaction, shmem)
{
	.kind = SHMEM,
};

FIXTURE_VARIANT_ADD(migrate_compaction, file)
{
	.kind = LOCAL_FILE,
};

/*
 * Compaction gives up on a zone if what free pages it has at hand make no block
 * as large as a folio: whether large folios move is a matter of luck.
 */
FIXTURE_VARIANT_ADD(migrate_compaction, mthp)
{
	.kind = MTHP,
	.may_stay = true,
};

FIXTURE_SETUP(migrate_compaction)
{
	if (access("/proc/sys/vm/compact_memory", W_OK))
		SKIP(return, "no compaction, or no right to start it");

	create_area(_metadata, &self->area, variant->kind, MBIND,
		    NR_COMPACTION_PAGES);
}

FIXTURE_TEARDOWN(migrate_compaction)
{
}

static void free_pages(struct __test_metadata *_metadata, struct area *a,
		       void *start, size_t nr_pages)
{
	ASSERT_EQ(madvise(start, nr_pages * psize(),
			  is_private(a) ? MADV_DONTNEED : MADV_REMOVE), 0);
}

/*
 * Free every other folio, of fresh ones: the holes of an earlier attempt may be
 * filled with memory of others, which compaction took to be a good place for it.
 * It can use a freed page only when the CPU which freed it gives it back: each
 * refresh makes CPUs give back some.
 */
static void make_holes(struct __test_metadata *_metadata, struct area *a)
{
	size_t i, page = 0;

	free_pages(_metadata, a, a->start, a->nr_pages);
	populate(_metadata, a);
	find_folios(_metadata, a);

	memset(a->hole, false, a->nr_pages * sizeof(*a->hole));
	for (i = 0; i < a->nr_folios; page += a->folio_pages[i++]) {
		const size_t nr = a->folio_pages[i];

		if (i % 2 == 0)
			continue;
		free_pages(_metadata, a, a->folios[i], nr);
		memset(a->hole + page, true, nr * sizeof(*a->hole));
	}

	for (i = 0; i < NR_REFRESHES; i++)
		set("/proc/sys/vm/stat_refresh", "1");
}

/* Compact, and count the pages of the area that are elsewhere afterwards. */
static size_t compact(struct __test_metadata *_metadata, struct area *a)
{
	struct counters old, new;
	size_t i, nr_moved = 0;

	read_pagemap(_metadata, a);
	for (i = 0; i < a->nr_pages; i++)
		a->flags[i] = PAGEMAP_PFN(a->entries[i]);

	read_counters(_metadata, &old);
	ASSERT_TRUE(set("/proc/sys/vm/compact_memory", "1"));
	read_counters(_metadata, &new);

	read_pagemap(_metadata, a);
	for (i = 0; i < a->nr_pages; i++)
		nr_moved += !a->hole[i] &&
			    a->flags[i] != PAGEMAP_PFN(a->entries[i]);

	ASSERT_GE(new.success - old.success, (long)nr_moved);
	return nr_moved;
}

TEST_F_TIMEOUT(migrate_compaction, quiet, TIMEOUT_SEC)
{
	struct area *a = &self->area;
	size_t nr_moved = 0;
	unsigned int round;

	for (round = 1; round <= MAX_ATTEMPTS && !nr_moved; round++) {
		make_holes(_metadata, a);
		fill(a, round, false);
		nr_moved = compact(_metadata, a);
		ASSERT_TRUE(area_is(a, a->start, round, false));
	}
	ASSERT_TRUE(nr_moved || variant->may_stay);
}

/* As above for memory that is written to all the time. Kills mutant 3. */
TEST_F_TIMEOUT(migrate_compaction, writer, TIMEOUT_SEC)
{
	struct area *a = &self->area;
	bool moved_while_writing = false;
	unsigned int round;

	for (round = 1; round <= MAX_ATTEMPTS && !moved_while_writing; round++) {
		struct writer writer = {};
		__u64 old;

		make_holes(_metadata, a);
		if (!start_writer(_metadata, &writer, a))
			return;
		fill(a, round, true);
		old = nr_writes(&writer);
		if (compact(_metadata, a))
			moved_while_writing = nr_writes(&writer) != old;
		look_after_writer(_metadata, &writer, round);
		stop_writer(_metadata, &writer, round);
	}
	ASSERT_TRUE(moved_while_writing || variant->may_stay);
}

int main(int argc, char **argv)
{
	save_settings_and_be_quiet();
	return test_harness_run(argc, argv);
}
