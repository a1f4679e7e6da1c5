/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shared by the programs that run inside the guest: memory of a known folio
 * size, placement, contents, counters, markers for the TCG plugin, JSON.
 */
#ifndef BENCH_H
#define BENCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#define BASE_PAGE	4096UL
#define KB		1024UL
#define MB		(1024UL * 1024)
#define PMD_KB		2048UL

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))

/* include/uapi/linux/mempolicy.h, so that no libnuma headers are needed */
#define MPOL_DEFAULT	0
#define MPOL_BIND	2
#define MPOL_INTERLEAVE	3
#define MPOL_MF_STRICT	(1 << 0)
#define MPOL_MF_MOVE	(1 << 1)
#define MPOL_MF_MOVE_ALL	(1 << 2)

/* Exit status: 1 is "measured, and it is wrong", 2 "could not measure". */
#define EXIT_WRONG	1
#define EXIT_UNABLE	2

/* util.c: errors, parsing, time, pinning */
void bench_init(const char *prog);
void die(const char *fmt, ...) __attribute__((noreturn, format(printf, 1, 2)));
void progress(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void *xcalloc(size_t n, size_t size);
uint64_t now_ns(void);
unsigned long parse_ulong(const char *opt, const char *text);
int write_file(const char *path, const char *text);
void require_file(const char *path, const char *text);
long read_long(const char *path);
void pin_to_cpu(int cpu);
void run_anywhere(void);
void pin_and_reexec(int cpu, char **argv);
int other_online_cpu(int cpu);
void quiet_guest(void);

/* mem.c: placement, folio sizes, contents */
enum mem_kind { MEM_ANON, MEM_SHMEM };

struct region {
	char *addr;
	size_t bytes;
	unsigned long folio_kb;
	enum mem_kind kind;
	uint64_t seed;
};

void region_make(struct region *r, int node);
void region_unmap(struct region *r);
void region_fill(struct region *r, uint64_t seed);
void region_rewrite(const struct region *r, size_t page);
unsigned long region_bad_words(const struct region *r);
unsigned long region_folios(const struct region *r);
unsigned long region_intact_folios(const struct region *r);
unsigned long region_mapcount(const struct region *r, size_t page);
unsigned long region_mappings(const struct region *r);
unsigned long region_pages_on(const struct region *r, int node);

void spread_over_nodes(void);
void drain_lru(void);
int mbind_move(const struct region *r, int node);
int mbind_move_all(const struct region *r, int node);
int move_folios(const struct region *r, int node);

/* stats.c: counters */
#define STAT_MAX	512
#define STAT_NAME	56

struct stats {
	unsigned int nr;
	struct {
		char name[STAT_NAME];
		long val;
	} s[STAT_MAX];
};

void vmstat_read(struct stats *st);
void mthp_read(struct stats *st, unsigned long folio_kb);
long stat_get(const struct stats *st, const char *name);
long stat_delta(const struct stats *a, const struct stats *b, const char *name);
long smaps_kb(const void *addr, const char *field);
long mem_free_kb(int node);
int nr_nodes(void);

/* flush.c: how TLB flushes are done, and how many calls there were */
enum flush_mode { FLUSH_LOCAL, FLUSH_DEFERRED };

void flush_mode_start(enum flush_mode mode, int cpu, bool helper_spins);
void flush_mode_turn(void);
const char *flush_mode_error(const struct stats *a, const struct stats *b,
			     long ptes);
void flush_trace_start(void);
long flush_trace_end(void);

/* children.c: children that do something, and then wait */
typedef unsigned long (*child_fn)(unsigned long nr);

unsigned long children_affordable(unsigned long want, unsigned long child_kb,
				  unsigned long keep_kb);
void children_start(unsigned long nr, unsigned long jobs, child_fn work,
		    child_fn check);
unsigned long children_end(unsigned long nr);

/* json.c: one object per line on stdout */
void json_begin(const char *prog);
void json_str(const char *key, const char *val);
void json_int(const char *key, long long val);
void json_bool(const char *key, bool val);
void json_delta(const char *key, const struct stats *a, const struct stats *b);
void json_stats(const char *key, const struct stats *st);
void json_end(void);

/*
 * Markers. The plugin counts from the first instruction of one rarely used
 * system call to the first of another; the numbering of intervals in its
 * output is the order of these calls in one boot.
 */
int mark_start(void);
void mark_end(void);

#endif /* BENCH_H */
