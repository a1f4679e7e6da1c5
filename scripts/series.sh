# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Reading the series and turning it into commits.  Nothing here needs a work
# tree: patches are applied to an index, so that checks take seconds.
#
#   patches/series	# topic: NAME, then lines: NAME/NNNN-x.patch [NEW FILE...]
#   patches/series.tree	tree id after each of these lines, for the pinned base

REPO=${REPO:-$TOP}		# where patches/ and the new files stand
PATCHES=$REPO/patches

series_lines()
{
	sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$PATCHES/series"
}

# The topics in the order of the series.
series_topics()
{
	series_lines | cut -d/ -f1 | uniq
}

# The topics named, and the earlier ones that their covers say they need.
wanted_topics()	# [TOPIC...]
{
	local topic more want=" $* "

	if [ $# = 0 ]; then
		series_topics
		return
	fi
	for topic; do
		series_topics | grep -qxF "$topic" ||
			die "no topic '$topic' in patches/series; there are: $(series_topics | tr '\n' ' ')"
	done
	while :; do
		more=
		for topic in $want; do
			for need in $(sed -n 's/^Needs: *//p' "$PATCHES/$topic/cover.txt" 2>/dev/null); do
				[[ $want == *" $need "* ]] || more+="$need "
			done
		done
		[ -n "$more" ] || break
		want+="$more"
	done
	series_topics | while read -r topic; do
		[[ $want == *" $topic "* ]] && echo "$topic"
		:
	done
}

# --- what must hold before a patch is even tried -----------------------------

new_files()	# of the whole series
{
	series_lines | awk '{ for (i = 2; i <= NF; i++) print $i }'
}

repo_new_files()
{
	local dir

	for dir in "${KERNEL_DIRS[@]}"; do
		[ ! -d "$REPO/$dir" ] || (cd "$REPO" && find "$dir" -type f)
	done | sort
}

# Prints what is wrong with patches/ and the new files; silence is good.
series_complaints()	# BASE-COMMIT
{
	local base=$1 file list

	list=$(series_lines | cut -d' ' -f1 | cut -f1)
	sort <<<"$list" | uniq -d | sed 's/^/listed twice in patches\/series: /'
	(cd "$PATCHES" && find . -name '*.patch' | sed 's,^\./,,' | sort) |
		while read -r file; do
			grep -qxF "$file" <<<"$list" || echo "no line of patches/series lists $file"
		done
	for file in $list; do
		if [ ! -f "$PATCHES/$file" ]; then
			echo "patches/series lists $file, which does not exist"
		elif grep -qE '^(new file mode|deleted file mode|rename from|--- /dev/null)' "$PATCHES/$file"; then
			echo "$file adds, removes or renames a whole file: new files stand at their kernel path, unpatched"
		fi
	done
	new_files | sort | uniq -d | sed 's/^/claimed by two lines of patches\/series: /'
	repo_new_files | while read -r file; do
		new_files | grep -qxF "$file" || echo "no line of patches/series claims the new file $file"
	done
	new_files | while read -r file; do
		if [ ! -f "$REPO/$file" ]; then
			echo "patches/series claims $file, which does not exist"
		elif git_linux cat-file -e "$base:$file" 2>/dev/null; then
			echo "$file exists in the base already: it must be a hunk in a patch, not a new file"
		elif ! grep -qE "^($(IFS='|'; echo "${KERNEL_DIRS[*]}"))/" <<<"$file"; then
			echo "$file is not below one of: ${KERNEL_DIRS[*]}"
		fi
	done
}

# --- new files as they were when their patch brought them --------------------

# A later patch may change a new file.  What stands in the repo is the final
# text, so take the later hunks off again, last one first.
derive_new_files()	# DIR: receives N/path for the file path brought by line N
{
	local dir=$1 n=0 i file patch
	local -a lines

	mapfile -t lines < <(series_lines)
	for ((n = 0; n < ${#lines[@]}; n++)); do
		for file in $(cut -s -d' ' -f2- <<<"${lines[n]//$'\t'/ }"); do
			install -D -m "$(mode_of "$REPO/$file")" "$REPO/$file" "$dir/$n/$file"
			for ((i = ${#lines[@]} - 1; i > n; i--)); do
				patch=$PATCHES/${lines[i]%%[[:space:]]*}
				grep -qxF "+++ b/$file" "$patch" || continue
				(cd "$dir/$n" && GIT_DIR=/nonexistent git apply -R --include="$file" "$patch") ||
					die "${lines[i]%%[[:space:]]*} does not come off $file"
			done
		done
	done
}

mode_of() { [ -x "$1" ] && echo 755 || echo 644; }

# --- one line of the series becomes one commit -------------------------------

header()	# PATCH NAME
{
	sed -n "1,/^\$/s/^$2: //p" "$1" | head -n 1
}

commit_message()	# PATCH TOPIC
{
	{
		header "$1" Subject
		echo
		sed -e '1,/^$/d' -e '/^---$/,$d' "$1"
	} | git interpret-trailers --trailer "Topic: $2"
}

# The tree exists only in GIT_INDEX_FILE.  Identity and dates come from the
# patch, for the committer too, so that equal series give equal commits.
commit_index()	# PARENT PATCH TOPIC
{
	local from date

	from=$(header "$2" From)
	date=$(header "$2" Date)
	[[ $from == *\<*@*\> && -n $date && -n $(header "$2" Subject) ]] ||
		die "${2#"$PATCHES"/}: needs the headers From (name and address), Date and Subject"
	commit_message "$2" "$3" |
		GIT_AUTHOR_NAME=${from% <*} GIT_AUTHOR_EMAIL=$(sed 's/.*<\(.*\)>/\1/' <<<"$from") \
		GIT_AUTHOR_DATE=$date GIT_COMMITTER_NAME=${from% <*} \
		GIT_COMMITTER_EMAIL=$(sed 's/.*<\(.*\)>/\1/' <<<"$from") GIT_COMMITTER_DATE=$date \
		git_linux commit-tree "$(git_linux write-tree)" -p "$1"
}

# git apply refuses fuzz.  On the pinned base it may not even shift a line.
apply_exactly()	# PATCH STRICT
{
	local out

	grep -q '^diff --git' "$1" || return 0
	out=$(git_linux apply --cached --verbose --whitespace=nowarn "$1" 2>&1) ||
		die "${1#"$PATCHES"/} does not apply:
$out"
	if [ "$2" = 1 ] && grep -q 'offset' <<<"$out"; then
		die "${1#"$PATCHES"/} applies only with an offset; 'make export' writes it anew:
$out"
	fi
}

# Prints "PATCH COMMIT TREE" for each line of the wanted topics.
series_commits()	# BASE-COMMIT STRICT [TOPIC...]
{
	local base=$1 strict=$2 dir n patch topic file head wanted
	local -a lines
	shift 2

	wanted=$(wanted_topics "$@") || exit 1
	dir=$(mktemp -d "$SCRATCH/series.XXXXXX")
	export GIT_INDEX_FILE=$dir/index
	derive_new_files "$dir" || exit 1
	git_linux read-tree "$base"
	head=$base
	mapfile -t lines < <(series_lines)
	for ((n = 0; n < ${#lines[@]}; n++)); do
		patch=${lines[n]%%[[:space:]]*}
		topic=${patch%%/*}
		grep -qxF "$topic" <<<"$wanted" || continue
		for file in $(cut -s -d' ' -f2- <<<"${lines[n]//$'\t'/ }"); do
			git_linux update-index --add --cacheinfo \
				"100$(mode_of "$dir/$n/$file"),$(git_linux hash-object -w "$dir/$n/$file"),$file"
		done
		apply_exactly "$PATCHES/$patch" "$strict"
		head=$(commit_index "$head" "$PATCHES/$patch" "$topic") || exit 1
		echo "$patch $head $(git_linux rev-parse "$head^{tree}")"
	done
	unset GIT_INDEX_FILE
	rm -rf "$dir"
}

# --- and back -----------------------------------------------------------------

# Writes the commits BASE..HEAD as patches/ and new files below DIR.
export_commits()	# BASE HEAD DIR
{
	local base=$1 head=$2 dir=$3 commit topic='' last='' nr=0 name added file

	mkdir -p "$dir/patches"
	[ -z "$(git_linux rev-list --merges "$base..$head")" ] ||
		die "there are merges in $base..$head: make it a line ('git rebase')"
	series_head >"$dir/patches/series"
	: >"$dir/patches/series.tree"
	for commit in $(git_linux rev-list --reverse "$base..$head"); do
		topic=$(git_linux log -1 --format='%(trailers:key=Topic,valueonly)' "$commit" | head -n 1)
		topic=${topic:-$last}
		[ -n "$topic" ] || die "$(git_linux log -1 --format='%h (%s)' "$commit"): the first commit needs a trailer 'Topic: NAME'"
		if [ "$topic" != "$last" ]; then
			[ ! -d "$dir/patches/$topic" ] || die "the commits of topic $topic do not stand together"
			mkdir -p "$dir/patches/$topic"
			printf '\n# topic: %s\n' "$topic" >>"$dir/patches/series"
			last=$topic
			nr=0
		fi
		nr=$((nr + 1))
		name=$(printf '%s/%04d-%s.patch' "$topic" $nr "$(git_linux log -1 --format=%f "$commit" | cut -c 1-60 | sed 's/[-.]*$//')")
		mapfile -t added < <(git_linux diff-tree -r --no-renames --diff-filter=A --name-only "$commit^" "$commit")
		export_patch "$commit" "${added[@]}" >"$dir/patches/$name"
		echo "$name${added[*]:+	${added[*]}}" >>"$dir/patches/series"
		echo "$(git_linux rev-parse "$commit^{tree}") $name" >>"$dir/patches/series.tree"
		for file in "${added[@]}"; do
			git_linux cat-file -e "$base:$file" 2>/dev/null &&
				die "$commit adds $file again, which the base has"
			mkdir -p "$dir/$(dirname "$file")"
			git_linux cat-file -e "$head:$file" 2>/dev/null ||
				die "$name adds $file, and a later commit removes it again"
			git_linux show "$head:$file" >"$dir/$file"
			git_linux ls-tree "$head" "$file" | grep -q ^100755 && chmod +x "$dir/$file"
			:
		done
	done
}

series_head()
{
	cat <<-'EOF'
	# The series, in order: a patch, then the new files that it brings.
	# Written by 'make export'; '# topic:' lines group it.
	EOF
}

# A patch without what changes by itself: no commit id, no index lines, no
# statistics, no signature of a git version.
export_patch()	# COMMIT [ADDED-FILE...]
{
	local commit=$1 body file
	local -a exclude=()
	shift

	for file; do
		exclude+=(":(exclude)$file")
	done
	body=$(git_linux log -1 --format=%b "$commit" | sed '/^Topic: /d')
	if grep -qE '^(---|diff |Index: )' <<<"$body"; then
		die "$(git_linux log -1 --format='%h (%s)' "$commit"): a line of its log begins with '---' or 'diff ', where patch tools stop reading"
	fi
	git_linux log -1 --format='From: %an <%ae>%nDate: %aD%nSubject: %s%n' "$commit"
	[ -n "$body" ] && printf '%s\n' "$body"
	printf -- '---\n\n'
	git_linux diff-tree -p --no-renames --diff-algorithm=histogram --src-prefix=a/ --dst-prefix=b/ \
		"$commit^" "$commit" -- . "${exclude[@]}" | sed '/^index [0-9a-f]*\.\./d'
}
