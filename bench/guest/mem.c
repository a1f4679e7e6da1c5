// SPDX-License-Identifier: GPL-2.0
/* Memory of a known folio size: mapping, placement, moving, contents. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bench.h"

#define THP_DIR		"/sys/kernel/mm/transparent_hugepage"

/* include/uapi/linux/kernel-page-flags.h */
#define KPF_COMPOUND_HEAD	(1ULL << 15)
#define KPF_COMPOUND_TAIL	(1ULL << 16)

#define PM_PRESENT	(1ULL << 63)
#define PM_PFN		((1ULL << 55) - 1)

/*
 * Only the size asked for may be allocated, or the kernel would serve a
 * request for 64K with 2M. A size that shmem or anon does not offer has no
 * such file, which is right for all but the wanted one.
 */
static void set_thp_size(enum mem_kind kind, const char *size, bool on)
{
	const char *file = kind == MEM_ANON ? "enabled" : "shmem_enabled";
	const char *mode = kind == MEM_ANON ? "madvise" : "advise";
	char path[512];
	int ret;

	snprintf(path, sizeof(path), THP_DIR "/%s/%s", size, file);
	ret = write_file(path, on ? mode : "never");
	if (ret && on)
		die("%s: %s: this kernel has no folios of that size", path,
		    strerror(-ret));
}

static void thp_setup(enum mem_kind kind, unsigned long folio_kb)
{
	char want[64];
	struct dirent *e;
	bool seen = false;
	DIR *d;

	snprintf(want, sizeof(want), "hugepages-%lukB", folio_kb);
	d = opendir(THP_DIR);
	if (!d && folio_kb > 4)
		die("%s: %s", THP_DIR, strerror(errno));
	while (d && (e = readdir(d))) {
		if (strncmp(e->d_name, "hugepages-", 10))
			continue;
		set_thp_size(kind, e->d_name, !strcmp(e->d_name, want));
		seen |= !strcmp(e->d_name, want);
	}
	if (d)
		closedir(d);
	if (folio_kb > 4 && !seen)
		die("this kernel has no folios of %lu kB", folio_kb);
}

/*
 * Policy of the task, not of the VMA: a child that copies the memory would
 * otherwise inherit the binding and put all its copies on the same node.
 */
static void set_task_node(int node)
{
	unsigned long mask = node < 0 ? 0 : 1UL << node;
	long ret;

	if (node < 0)
		ret = syscall(SYS_set_mempolicy, MPOL_DEFAULT, NULL, 0);
	else
		ret = syscall(SYS_set_mempolicy, MPOL_BIND, &mask,
			      sizeof(mask) * 8);
	if (ret)
		die("set_mempolicy to node %d: %s", node, strerror(errno));
}

/* What this task allocates from now on comes from all nodes in turn. */
void spread_over_nodes(void)
{
	unsigned long mask = (1UL << nr_nodes()) - 1;

	if (syscall(SYS_set_mempolicy, MPOL_INTERLEAVE, &mask,
		    sizeof(mask) * 8))
		die("set_mempolicy to all nodes: %s", strerror(errno));
}

static char *map_aligned(size_t bytes, size_t align, int flags, int fd)
{
	char *p, *start;

	p = mmap(NULL, bytes + align, PROT_NONE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		die("mmap of %zu bytes: %s", bytes + align, strerror(errno));
	start = (char *)(((unsigned long)p + align - 1) & ~(align - 1));
	p = mmap(start, bytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
	if (p == MAP_FAILED)
		die("mmap of %zu bytes: %s", bytes, strerror(errno));
	return p;
}

/* The PROT_NONE surroundings stay: no neighbour can be merged with. */
static void region_map(struct region *r)
{
	int fd;

	if (r->kind == MEM_ANON) {
		r->addr = map_aligned(r->bytes, PMD_KB * KB,
				      MAP_PRIVATE | MAP_ANONYMOUS, -1);
	} else {
		fd = memfd_create("bench", MFD_CLOEXEC);
		if (fd < 0 || ftruncate(fd, r->bytes))
			die("memfd of %zu bytes: %s", r->bytes,
			    strerror(errno));
		r->addr = map_aligned(r->bytes, PMD_KB * KB, MAP_SHARED, fd);
		close(fd);
	}
	if (r->folio_kb > 4 && madvise(r->addr, r->bytes, MADV_HUGEPAGE))
		die("MADV_HUGEPAGE: %s", strerror(errno));
	/* Fails on a kernel without large folios, which is as good. */
	if (r->folio_kb == 4)
		madvise(r->addr, r->bytes, MADV_NOHUGEPAGE);
}

void region_unmap(struct region *r)
{
	munmap(r->addr, r->bytes);
	r->addr = NULL;
}

/* A page in the wrong place, or of an earlier round, cannot look right. */
static inline uint64_t word_at(uint64_t seed, size_t i)
{
	return seed ^ (i * 0x9e3779b97f4a7c15ULL);
}

void region_fill(struct region *r, uint64_t seed)
{
	uint64_t *w = (uint64_t *)r->addr;
	size_t i, n = r->bytes / sizeof(*w);

	r->seed = seed * 0xd6e8feb86659fd93ULL + 1;
	for (i = 0; i < n; i++)
		w[i] = word_at(r->seed, i);
}

/* Writes the first word of a page, which stays what it is, and reads nothing. */
void region_rewrite(const struct region *r, size_t page)
{
	size_t i = page * BASE_PAGE / sizeof(uint64_t);

	((volatile uint64_t *)r->addr)[i] = word_at(r->seed, i);
}

unsigned long region_bad_words(const struct region *r)
{
	const uint64_t *w = (const uint64_t *)r->addr;
	size_t i, n = r->bytes / sizeof(*w);
	unsigned long bad = 0;

	for (i = 0; i < n; i++)
		bad += w[i] != word_at(r->seed, i);
	return bad;
}

unsigned long region_folios(const struct region *r)
{
	return r->bytes / (r->folio_kb * KB);
}

static uint64_t *read_pagemap(const struct region *r, size_t *nr)
{
	size_t n = r->bytes / BASE_PAGE, len = n * sizeof(uint64_t);
	off_t off = (unsigned long)r->addr / BASE_PAGE * sizeof(uint64_t);
	uint64_t *map = xcalloc(n, sizeof(*map));
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || pread(fd, map, len, off) != (ssize_t)len)
		die("/proc/self/pagemap: %s", strerror(errno));
	close(fd);
	*nr = n;
	return map;
}

static uint64_t page_flags(int fd, uint64_t pfn)
{
	uint64_t flags;

	if (pread(fd, &flags, sizeof(flags), pfn * sizeof(flags)) !=
	    sizeof(flags))
		die("/proc/kpageflags: %s", strerror(errno));
	return flags;
}

/* One head, then tails only, physically contiguous, and no tail after. */
static bool folio_intact(int fd, const uint64_t *map, size_t pages)
{
	uint64_t pfn = map[0] & PM_PFN, flags;
	size_t i;

	for (i = 0; i < pages; i++) {
		if (!(map[i] & PM_PRESENT) || (map[i] & PM_PFN) != pfn + i)
			return false;
		flags = page_flags(fd, pfn + i);
		if (pages == 1)
			return !(flags & (KPF_COMPOUND_HEAD | KPF_COMPOUND_TAIL));
		if (!(flags & (i ? KPF_COMPOUND_TAIL : KPF_COMPOUND_HEAD)))
			return false;
	}
	return !(page_flags(fd, pfn + pages) & KPF_COMPOUND_TAIL);
}

unsigned long region_intact_folios(const struct region *r)
{
	size_t i, nr, step = r->folio_kb * KB / BASE_PAGE;
	unsigned long intact = 0;
	uint64_t *map = read_pagemap(r, &nr);
	int fd = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		die("/proc/kpageflags: %s (CONFIG_PROC_PAGE_MONITOR?)",
		    strerror(errno));
	for (i = 0; i + step <= nr; i += step)
		intact += folio_intact(fd, map + i, step);
	close(fd);
	free(map);
	return intact;
}

/* In how many page tables the pages from @first to before @end are, in all. */
static unsigned long count_mappings(const struct region *r, size_t first,
				    size_t end)
{
	uint64_t *map, pfn, count;
	unsigned long sum = 0;
	size_t nr;
	int fd;

	map = read_pagemap(r, &nr);
	fd = open("/proc/kpagecount", O_RDONLY | O_CLOEXEC);
	for (; first < end; first++) {
		pfn = map[first] & PM_PFN;
		if (fd < 0 || pread(fd, &count, sizeof(count),
				    pfn * sizeof(count)) != sizeof(count))
			die("/proc/kpagecount: %s", strerror(errno));
		sum += count;
	}
	close(fd);
	free(map);
	return sum;
}

unsigned long region_mapcount(const struct region *r, size_t page)
{
	return count_mappings(r, page, page + 1);
}

unsigned long region_mappings(const struct region *r)
{
	return count_mappings(r, 0, r->bytes / BASE_PAGE);
}

/* Nodes of every base page, asked of the kernel: move_pages with no target. */
unsigned long region_pages_on(const struct region *r, int node)
{
	size_t i, j, n, nr = r->bytes / BASE_PAGE;
	void *pages[512];
	int status[512];
	unsigned long on = 0;

	for (i = 0; i < nr; i += n) {
		n = nr - i < ARRAY_SIZE(pages) ? nr - i : ARRAY_SIZE(pages);
		for (j = 0; j < n; j++)
			pages[j] = r->addr + (i + j) * BASE_PAGE;
		if (syscall(SYS_move_pages, 0, n, pages, NULL, status, 0))
			die("move_pages (query): %s", strerror(errno));
		for (j = 0; j < n; j++)
			on += status[j] == node;
	}
	return on;
}

/*
 * Maps and fills a region on @node, and makes sure that it is what was asked
 * for. Large folios are switched off again afterwards: migration does not
 * need the permission to fault them in, but khugepaged would use it to put
 * back together what a migration has split.
 */
void region_make(struct region *r, int node)
{
	unsigned long intact;

	thp_setup(r->kind, r->folio_kb);
	region_map(r);
	set_task_node(node);
	region_fill(r, 0);
	set_task_node(-1);
	thp_setup(r->kind, 4);
	intact = region_intact_folios(r);
	if (intact != region_folios(r))
		die("only %lu of %lu folios of %lu kB could be had: memory too fragmented or too little",
		    intact, region_folios(r), r->folio_kb);
	if (region_pages_on(r, node) != r->bytes / BASE_PAGE)
		die("not all memory could be had on node %d", node);
}

static int mbind_flags(const struct region *r, int node, unsigned int flags)
{
	unsigned long mask = 1UL << node;

	if (syscall(SYS_mbind, r->addr, r->bytes, MPOL_BIND, &mask,
		    sizeof(mask) * 8, flags | MPOL_MF_STRICT))
		return -errno;
	return 0;
}

int mbind_move(const struct region *r, int node)
{
	return mbind_flags(r, node, MPOL_MF_MOVE);
}

/* Pages that other processes map, too. */
int mbind_move_all(const struct region *r, int node)
{
	return mbind_flags(r, node, MPOL_MF_MOVE_ALL);
}

/*
 * One address per folio: a second address of a folio that the same call has
 * already isolated ends the batch with -EBUSY.
 */
int move_folios(const struct region *r, int node)
{
	size_t i, nr = region_folios(r), bad = 0;
	void **pages = xcalloc(nr, sizeof(*pages));
	int *nodes = xcalloc(nr, sizeof(*nodes));
	int *status = xcalloc(nr, sizeof(*status));
	long ret;

	for (i = 0; i < nr; i++) {
		pages[i] = r->addr + i * r->folio_kb * KB;
		nodes[i] = node;
		status[i] = -1;
	}
	ret = syscall(SYS_move_pages, 0, nr, pages, nodes, status,
		      MPOL_MF_MOVE);
	if (ret < 0)
		ret = -errno;
	for (i = 0; i < nr; i++)
		bad += status[i] != node;
	free(pages);
	free(nodes);
	free(status);
	if (!ret && bad)
		ret = bad;
	return ret;
}

/*
 * Folios that wait in a CPU's batch to be put on an LRU list, or to be
 * marked mlocked, are on none: mbind() has all CPUs empty their batches.
 */
void drain_lru(void)
{
	struct region r = { .kind = MEM_ANON, .bytes = BASE_PAGE };

	region_map(&r);
	*(volatile char *)r.addr = 1;
	mbind_move(&r, 0);
	region_unmap(&r);
}
