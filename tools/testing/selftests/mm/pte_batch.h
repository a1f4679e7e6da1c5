/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the tests of batched page table changes have in common: large folios
 * whose pages are in different states, and ways to see whether these are kept.
 *
 * Pages get their state in runs of several lengths. What can be seen of it in
 * pagemap is saved, something is done to the folios, and what is seen then has
 * to be the same.
 */
#ifndef __PTE_BATCH_H__
#define __PTE_BATCH_H__

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <linux/userfaultfd.h>

#include "kselftest_harness.h"
#include "migrate_util.h"

#define SZ_1M		0x100000UL
#define MEMORY		"/sys/devices/system/memory/memory"
#define NODE		"/sys/devices/system/node/node"

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
	int fd;			/* of the file; -1 for anonymous memory */
	bool may_split;		/* there is reason to split a folio ... */
	bool may_unmap;		/* ... and pages are not mapped again then */
	uint64_t *want;		/* contents of each page */
	uint64_t *saved;	/* pagemap entry of each page */
	uint64_t *from;		/* the same when the move began */
	uint64_t *now;
	struct folio_stats before;
};

static inline char *page_of(struct area *a, size_t i)
{
	return a->mem + i * psize();
}

static inline char *folio_addr(struct area *a, int i)
{
	return a->mem + i * a->size;
}

static inline size_t folio_pages(struct area *a)
{
	return a->size / psize();
}

/* Runs of one to seven pages, the same in each folio; the first is in one. */
static inline bool in_run(struct area *a, size_t page)
{
	size_t i = page % folio_pages(a);

	return (i % 7 < 3) != (i / 8 % 2);
}

static inline bool write_str(const char *path, const char *str)
{
	int fd = open(path, O_WRONLY);
	bool ok;

	if (fd < 0)
		return false;
	ok = write(fd, str, strlen(str)) == (ssize_t)strlen(str);
	close(fd);
	return ok;
}

/* What a page is to hold from now on. */
static inline uint64_t next_word(struct area *a, size_t i)
{
	a->want[i] += (i + 1) * 0x9e3779b97f4a7c15ULL;
	return a->want[i];
}

static inline void write_page(struct area *a, size_t i)
{
	const uint64_t word = next_word(a, i);

	*(uint64_t *)page_of(a, i) = word;
}

static inline bool page_is_right(struct area *a, size_t i)
{
	return FORCE_READ(*(uint64_t *)page_of(a, i)) == a->want[i];
}

/* First page that does not hold what it should; -1 if all do. */
static inline long bad_page(struct area *a)
{
	for (size_t i = 0; i < a->nr; i++)
		if (!page_is_right(a, i))
			return i;
	return -1;
}

static inline bool contents_are_right(void *arg)
{
	return bad_page(arg) == -1;
}

/* ... of a child that has only the pages that are in runs. */
static inline bool contents_are_kept(void *arg)
{
	struct area *a = arg;

	for (size_t i = 0; i < a->nr; i++)
		if (in_run(a, i) && !page_is_right(a, i))
			return false;
	return true;
}

static inline bool read_pagemap(struct area *a, uint64_t *entries)
{
	return pread(a->pagemap, entries, a->nr * sizeof(*entries),
		     (uintptr_t)a->mem / psize() * sizeof(*entries)) ==
	       (ssize_t)(a->nr * sizeof(*entries));
}

/* First page whose state is not what it was; -1 if all are the same. */
static inline long changed_page(struct area *a, uint64_t bits)
{
	uint64_t changed;

	if (!read_pagemap(a, a->now))
		return 0;
	for (size_t i = 0; i < a->nr; i++) {
		if (a->may_unmap && !(a->now[i] & PM_PRESENT))
			continue;
		changed = (a->now[i] ^ a->saved[i]) & bits;
		/*
		 * Without mapcounts of pages, this bit is clear for all of a
		 * folio that a child has a part of. Once compaction has split
		 * the folio, it is exact: set where the child has nothing.
		 */
		if (a->op == OP_COMPACT && !in_run(a, i) &&
		    (a->now[i] & PM_MMAP_EXCLUSIVE))
			changed &= ~PM_MMAP_EXCLUSIVE;
		if (changed)
			return i;
	}
	return -1;
}

/* First page whose state is not as given; -1 if all are. */
static inline long page_without(struct area *a, uint64_t mask, uint64_t bits)
{
	if (!read_pagemap(a, a->now))
		return 0;
	for (size_t i = 0; i < a->nr; i++)
		if ((a->now[i] & mask) != bits)
			return i;
	return -1;
}

/* Is it the pages in runs, and no others, that have this bit? */
static inline bool has_in_runs(struct area *a, uint64_t bit)
{
	if (!read_pagemap(a, a->now))
		return false;
	for (size_t i = 0; i < a->nr; i++)
		if (!!(a->now[i] & bit) != in_run(a, i))
			return false;
	return true;
}

/* --- set up and torn down ------------------------------------------------- */

static inline bool set_block(int block, const char *state)
{
	char path[64];

	snprintf(path, sizeof(path), MEMORY "%d/state", block);
	return write_str(path, state);
}

/* Have a block of memory on @node that only movable pages are taken from. */
static inline int make_movable_block(int node)
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
static inline const char *area_setup(struct area *a, size_t kb, enum op op)
{
	const size_t pmd = read_pmd_pagesize();

	*a = (struct area) {
		.op = op,
		.pagemap = -1,
		.uffd = -1,
		.fd = -1,
		.block = -1,
	};
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

static inline void area_teardown(struct area *a)
{
	if (a->reserved && a->reserved != MAP_FAILED)
		munmap(a->reserved, a->reserved_len);
	if (a->block >= 0 && set_block(a->block, "offline"))
		set_block(a->block, "online");
	thp_restore_settings();
}

/* Map the folios and fill them. */
static inline bool populate(struct area *a)
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
static inline bool populate_by_ptes(struct area *a)
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
static inline bool mix_soft_dirty(struct area *a)
{
	clear_softdirty();
	for (size_t i = 0; i < a->nr; i++)
		if (in_run(a, i))
			write_page(a, i);
	return has_in_runs(a, PM_SOFT_DIRTY);
}

/* Page by page: what mprotect() does to many at once may spread soft-dirty. */
static inline bool protect_all(struct area *a)
{
	for (size_t i = 0; i < a->nr; i++)
		if (mprotect(page_of(a, i), psize(), PROT_READ))
			return false;
	return true;
}

/* Pages in runs become write-protected, so that a write unprotects a page. */
static inline bool mix_uffd_wp(struct area *a)
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
static inline struct child mix_exclusive(struct area *a,
					 bool (*work)(void *))
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

static inline long minor_faults(void)
{
	struct rusage usage;

	getrusage(RUSAGE_THREAD, &usage);
	return usage.ru_minflt;
}

/* First page where a write faults and should not, or the other way round. */
static inline long page_not_writable_as(struct area *a,
					bool (*writable)(struct area *a,
							 size_t i))
{
	/* No fault of the stack: that may be write-protected as well */
	minor_faults();
	for (size_t i = 0; i < a->nr; i++) {
		long faults = minor_faults();

		write_page(a, i);
		if ((minor_faults() == faults) != writable(a, i))
			return i;
	}
	return -1;
}

/* --- moves ---------------------------------------------------------------- */

static inline bool move_pages_to(struct area *a, int node)
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

static inline bool mbind_to(struct area *a, int node)
{
	return mbind_node(a->mem, a->len, node, MPOL_MF_MOVE_ALL) == 0;
}

/* The block is all that its zone has; free, it is filled from below. */
static inline bool move_to_block(struct area *a)
{
	return move_pages_to(a, a->node[0]) && move_pages_to(a, a->node[1]) &&
	       read_pagemap(a, a->from);
}

/* How many folios are somewhere else now. */
static inline int nr_moved(struct area *a)
{
	int n = 0;

	if (!read_pagemap(a, a->now))
		return -1;
	for (size_t i = 0; i < a->nr; i += folio_pages(a))
		n += (a->now[i] & PM_PRESENT) &&
		     PAGEMAP_PFN(a->now[i]) != PAGEMAP_PFN(a->from[i]);
	return n;
}

/* Compaction moves folios up to where memory is free, but not all of it. */
static inline bool compact_block(struct area *a)
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

static inline bool start_move(struct area *a)
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

static inline bool is_whole(struct area *a, size_t first, int kpageflags)
{
	const uint64_t pfn = PAGEMAP_PFN(a->now[first]);
	uint64_t flags;

	for (size_t i = 0; i < folio_pages(a); i++) {
		if (PAGEMAP_PFN(a->now[first + i]) != pfn + i ||
		    pageflags_get(pfn + i, kpageflags, &flags) ||
		    !(flags & (i ? KPF_COMPOUND_TAIL : KPF_COMPOUND_HEAD)))
			return false;
	}
	return true;
}

/* How many folios are there in one piece, and mapped so? */
static inline int nr_whole(struct area *a)
{
	int kpageflags = open("/proc/kpageflags", O_RDONLY), n = 0;

	if (kpageflags < 0 || !read_pagemap(a, a->now))
		return -1;
	for (size_t i = 0; i < a->nr; i += folio_pages(a))
		n += is_whole(a, i, kpageflags);
	close(kpageflags);
	return n;
}

static inline void expect_same(struct __test_metadata *_metadata,
			       struct area *a, uint64_t bits)
{
	struct folio_stats now = read_folio_stats(a->size);
	int nr_large;

	EXPECT_EQ(changed_page(a, bits), -1) {
		TH_LOG("a PTE is not what it was");
	}
	EXPECT_EQ(bad_page(a), -1) {
		TH_LOG("a page does not hold what it did");
	}
	/* For want of free large blocks, compaction splits */
	if (a->op == OP_COMPACT || a->may_split)
		return;
	/* The page cache is in no statistics */
	nr_large = a->fd < 0 ? now.nr_anon - a->before.nr_anon : nr_whole(a);
	EXPECT_EQ(nr_large, a->nr_folios);
	EXPECT_EQ(now.split, a->before.split);
	EXPECT_EQ(now.split_deferred, a->before.split_deferred);
}

/* Twice, because a leak shows the second time. */
static inline void move_and_compare(struct __test_metadata *_metadata,
				    struct area *a)
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

/* --- signals and poison --------------------------------------------------- */

static sigjmp_buf after_signal __maybe_unused;
static int signal_code __maybe_unused;

static inline void jump(int sig, siginfo_t *info, void *context)
{
	signal_code = info->si_code;
	siglongjmp(after_signal, 1);
}

static inline void jump_on(int sig)
{
	struct sigaction sa = {
		.sa_sigaction = jump,
		.sa_flags = SA_SIGINFO,
	};

	sigaction(sig, &sa, NULL);
}

/* Have the memory of a page fail; returns 0 or an error. */
static inline int poison(struct area *a, size_t page)
{
	jump_on(SIGBUS);
	/* If the page stays mapped, there is a signal at once */
	if (sigsetjmp(after_signal, 1))
		return 0;
	return madvise(page_of(a, page), psize(), MADV_HWPOISON) ? errno : 0;
}

/* Is who reads the page told that its memory failed? Needs poison() before. */
static inline bool is_poisoned(struct area *a, size_t page)
{
	if (sigsetjmp(after_signal, 1))
		return signal_code == BUS_MCEERR_AR;
	FORCE_READ(*page_of(a, page));
	return false;
}

#endif /* __PTE_BATCH_H__ */
