// SPDX-License-Identifier: GPL-2.0
/* Counters: /proc/vmstat, per-size THP statistics, smaps, nodes. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"

/* What migration or reclaim may change; the rest of vmstat is noise here. */
static const char * const vmstat_prefixes[] = {
	"pgmigrate_", "nr_tlb_", "thp_", "nr_mlock", "nr_unevictable",
	"unevictable_pgs_", "nr_isolated_", "pgfault", "pgmajfault",
	"numa_pages_migrated", "numa_pte_updates", "numa_hint_faults",
	"pgdemote_", "pgpromote_", "migrate_", "migration_entry_", "numa_async_",
	"compact_migrate_",
	"nr_anon_pages", "nr_shmem", "allocstall_", "pswpin", "pswpout",
	"pglazyfree", "nr_swapcached",
};

static bool wanted(const char *name)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(vmstat_prefixes); i++)
		if (!strncmp(name, vmstat_prefixes[i],
			     strlen(vmstat_prefixes[i])))
			return true;
	return false;
}

static void stat_add(struct stats *st, const char *name, long val)
{
	if (st->nr == STAT_MAX)
		die("more than %d counters", STAT_MAX);
	snprintf(st->s[st->nr].name, STAT_NAME, "%.*s", STAT_NAME - 1, name);
	st->s[st->nr++].val = val;
}

/* CPUs keep small differences to themselves: collect them first. */
void vmstat_read(struct stats *st)
{
	char name[STAT_NAME];
	long val;
	FILE *f;

	write_file("/proc/sys/vm/stat_refresh", "1");
	f = fopen("/proc/vmstat", "re");
	if (!f)
		die("/proc/vmstat: %s", strerror(errno));
	st->nr = 0;
	while (fscanf(f, "%55s %ld", name, &val) == 2)
		if (wanted(name))
			stat_add(st, name, val);
	fclose(f);
}

/* Base pages have no such directory: that is an empty set of counters. */
void mthp_read(struct stats *st, unsigned long folio_kb)
{
	char dir[128], path[512];
	struct dirent *e;
	DIR *d;

	st->nr = 0;
	snprintf(dir, sizeof(dir),
		 "/sys/kernel/mm/transparent_hugepage/hugepages-%lukB/stats",
		 folio_kb);
	d = opendir(dir);
	if (!d)
		return;
	while ((e = readdir(d))) {
		if (e->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "%s/%s", dir, e->d_name);
		stat_add(st, e->d_name, read_long(path));
	}
	closedir(d);
}

static bool stat_find(const struct stats *st, const char *name, long *val)
{
	unsigned int i;

	for (i = 0; i < st->nr; i++) {
		if (strcmp(st->s[i].name, name))
			continue;
		*val = st->s[i].val;
		return true;
	}
	return false;
}

/* -1 when this kernel has no such counter. */
long stat_get(const struct stats *st, const char *name)
{
	long val;

	return stat_find(st, name, &val) ? val : -1;
}

long stat_delta(const struct stats *a, const struct stats *b, const char *name)
{
	long va = 0, vb = 0;

	stat_find(a, name, &va);
	stat_find(b, name, &vb);
	return vb - va;
}

/* Sum of a field over the VMA that holds @addr; -1 when there is none. */
long smaps_kb(const void *addr, const char *field)
{
	unsigned long want = (unsigned long)addr, start, end;
	size_t len = strlen(field);
	bool here = false;
	long val = -1;
	char line[512];
	FILE *f;

	f = fopen("/proc/self/smaps", "re");
	if (!f)
		die("/proc/self/smaps: %s", strerror(errno));
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			here = want >= start && want < end;
		else if (here && !strncmp(line, field, len) && line[len] == ':')
			val = strtol(line + len + 1, NULL, 10);
	}
	fclose(f);
	return val;
}

long mem_free_kb(int node)
{
	char path[64], line[256];
	long val = -1;
	FILE *f;

	snprintf(path, sizeof(path), "/sys/devices/system/node/node%d/meminfo",
		 node);
	f = fopen(path, "re");
	if (!f)
		return -1;
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "Node %*d MemFree: %ld", &val) == 1)
			break;
	fclose(f);
	return val;
}

int nr_nodes(void)
{
	int n = 0;

	while (mem_free_kb(n) >= 0)
		n++;
	return n;
}
