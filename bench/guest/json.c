// SPDX-License-Identifier: GPL-2.0
/* One JSON object per line on stdout. */
#include <stdio.h>
#include <string.h>

#include "bench.h"

static void put_string(const char *s)
{
	putchar('"');
	for (; *s; s++) {
		if (*s == '"' || *s == '\\')
			printf("\\%c", *s);
		else if ((unsigned char)*s < ' ')
			printf("\\u%04x", *s);
		else
			putchar(*s);
	}
	putchar('"');
}

static void put_key(const char *key)
{
	printf(", ");
	put_string(key);
	printf(": ");
}

void json_begin(const char *prog)
{
	printf("{\"prog\": ");
	put_string(prog);
}

void json_str(const char *key, const char *val)
{
	put_key(key);
	put_string(val);
}

void json_int(const char *key, long long val)
{
	put_key(key);
	printf("%lld", val);
}

void json_bool(const char *key, bool val)
{
	put_key(key);
	printf("%s", val ? "true" : "false");
}

static void put_pair(const char *sep, const char *name, long val)
{
	printf("%s\"%s\": %ld", sep, name, val);
}

/* What did not change is left out: a missing counter reads as no change. */
void json_delta(const char *key, const struct stats *a, const struct stats *b)
{
	const char *sep = "";
	unsigned int i;

	put_key(key);
	putchar('{');
	for (i = 0; i < b->nr; i++) {
		long d = stat_delta(a, b, b->s[i].name);

		if (!d)
			continue;
		put_pair(sep, b->s[i].name, d);
		sep = ", ";
	}
	putchar('}');
}

void json_stats(const char *key, const struct stats *st)
{
	unsigned int i;

	put_key(key);
	putchar('{');
	for (i = 0; i < st->nr; i++)
		put_pair(i ? ", " : "", st->s[i].name, st->s[i].val);
	putchar('}');
}

void json_end(void)
{
	printf("}\n");
	fflush(stdout);
}
