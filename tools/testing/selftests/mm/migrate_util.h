/* SPDX-License-Identifier: GPL-2.0 */
/* What the tests that migrate anonymous large folios have in common. */
#ifndef __MIGRATE_UTIL_H__
#define __MIGRATE_UTIL_H__

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/magic.h>
#include <linux/mempolicy.h>

#include "vm_util.h"
#include "hugepage_settings.h"
#include "../../../../mm/gup_test.h"

/* What the kernel says about all folios of one size. */
struct folio_stats {
	unsigned long nr_anon;
	unsigned long nr_anon_partially_mapped;
	unsigned long split_deferred;
	unsigned long split;
};

static inline unsigned long folio_stat(size_t size, const char *name)
{
	char path[128];

	snprintf(path, sizeof(path),
		 "/sys/kernel/mm/transparent_hugepage/hugepages-%zukB/stats/%s",
		 size / 1024, name);
	return read_num(path);
}

static inline struct folio_stats read_folio_stats(size_t size)
{
	return (struct folio_stats) {
		.nr_anon = folio_stat(size, "nr_anon"),
		.nr_anon_partially_mapped =
			folio_stat(size, "nr_anon_partially_mapped"),
		.split_deferred = folio_stat(size, "split_deferred"),
		.split = folio_stat(size, "split"),
	};
}

/* Have folios of @size where madvise() asks for them, and no others. */
static inline void use_folios_of(size_t size)
{
	const int order = sz2ord(size, psize());
	struct thp_settings settings;

	thp_save_settings();
	thp_read_settings(&settings);
	settings.thp_enabled = THP_MADVISE;
	settings.use_zero_page = false;
	settings.khugepaged.defrag = false;
	for (int i = 0; i < NR_ORDERS; i++)
		settings.hugepages[i].enabled = THP_NEVER;
	settings.hugepages[order].enabled = THP_MADVISE;
	thp_push_settings(&settings);
}

/* One number out of a file of "name number" lines, -1 if it is not there. */
static inline long read_named(const char *path, const char *name)
{
	char line[256], key[64];
	long value, found = -1;
	FILE *file = fopen(path, "r");

	if (!file)
		return -1;
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%63[^: ]%*[: ]%ld", key, &value) == 2 &&
		    !strcmp(key, name)) {
			found = value;
			break;
		}
	}
	fclose(file);
	return found;
}

static inline int mbind_node(void *addr, size_t len, int node, int flags)
{
	unsigned long mask = 1UL << node;

	return syscall(__NR_mbind, addr, len, MPOL_BIND, &mask,
		       8 * sizeof(mask), flags);
}

static inline int node_of(void *addr)
{
	int status = -1;

	if (syscall(__NR_move_pages, 0, 1, &addr, NULL, &status, 0))
		return -errno;
	return status;
}

/* Two nodes with memory, from the list in sysfs ("0-1", "0,2", ...) */
static inline bool two_nodes(int node[2])
{
	char buf[64];
	int n = 0;

	if (read_file("/sys/devices/system/node/has_memory", buf,
		      sizeof(buf)) <= 0)
		return false;
	for (char *p = buf; *p && n < 2;) {
		int first = strtol(p, &p, 10), last = first;

		if (*p == '-')
			last = strtol(p + 1, &p, 10);
		while (first <= last && n < 2)
			node[n++] = first++;
		if (*p++ != ',')
			break;
	}
	return n == 2;
}

/* Where tests make their files. */
static inline const char *test_dir(void)
{
	return getenv("MIGRATE_TEST_DIR") ?: ".";
}

/* A file on a disk, so that it can be read again; -1 if there is none. */
static inline int open_disk_file(int flags)
{
	struct statfs fs;
	char path[256];
	int fd;

	snprintf(path, sizeof(path), "%s/migrate_test_XXXXXX", test_dir());
	fd = mkostemp(path, flags);
	if (fd < 0)
		return -1;
	unlink(path);
	if (!fstatfs(fd, &fs) && fs.f_type != TMPFS_MAGIC &&
	    fs.f_type != RAMFS_MAGIC)
		return fd;
	close(fd);
	return -1;
}

/* A long-term pin, by gup_test; gone when the file is closed. */
static inline int pin(char *addr, size_t size, int flags)
{
	struct pin_longterm_test args = {
		.addr = (uintptr_t)addr,
		.size = size,
		.flags = flags,
	};
	int fd = open("/sys/kernel/debug/gup_test", O_RDWR);

	if (fd >= 0 && ioctl(fd, PIN_LONGTERM_TEST_START, &args)) {
		close(fd);
		return -1;
	}
	return fd;
}

/* A child that stays, once it has done its work, until it is told to end. */
struct child {
	pid_t pid;
	int ready;	/* read end: one byte when the child's work is done */
	int go;		/* write end: closed to end the child */
};

/* @work is what the child does first, @check what it does in the end. */
static inline struct child start_child(bool (*work)(void *),
				       bool (*check)(void *), void *arg)
{
	int ready[2], go[2];
	struct child child;
	char byte = 0;

	if (pipe(ready) || pipe(go))
		return (struct child) { .pid = -1 };
	child = (struct child) { fork(), ready[0], go[1] };
	if (!child.pid) {
		close(ready[0]);
		close(go[1]);
		byte = !work || work(arg);
		if (write(ready[1], &byte, 1) == 1)
			byte = read(go[0], &byte, 1);
		_exit(check && !check(arg));
	}
	close(ready[1]);
	close(go[0]);
	return child;
}

static inline bool child_is_ready(struct child *child)
{
	char byte = 0;

	return child->pid > 0 && read(child->ready, &byte, 1) == 1 && byte;
}

/* Was the child content with what it found? */
static inline bool end_child(struct child *child)
{
	int status = -1;

	close(child->go);
	close(child->ready);
	return waitpid(child->pid, &status, 0) == child->pid && !status;
}

#endif /* __MIGRATE_UTIL_H__ */
