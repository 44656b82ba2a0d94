#!/usr/bin/env bash
# Put the four published lists of labeled ImageNet images into dataset/semi_files: downloaded from their publishers, or copied
# from a folder that has them under any name. Only a file with the right SHA-256 is put there; a list that is there is kept.
#   bash script/get_splits.sh [--from DIR]
fail() { echo "error: get_splits: $*" >&2; exit 2; }
from=
if [ $# -gt 0 ]; then
  [ "$1" = --from ] && [ $# -eq 2 ] || fail "usage: bash script/get_splits.sh [--from DIR]; got: $*"
  from=$(unset CDPATH; cd -- "$2" 2>/dev/null && pwd) || fail "--from $2: this folder does not exist; check the path"
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
folder=$ROOT/dataset/semi_files part=
trap '[ -z "$part" ] || rm -f "$part"' EXIT
mkdir -p "$folder" 2>/dev/null && [ -w "$folder" ] || fail "cannot write to $folder; check its permissions"

sha() {  # sha FILE
  if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi <"$1" | cut -d' ' -f1
}

fetch() {  # fetch URL FILE
  if command -v curl >/dev/null; then curl -fsSL --connect-timeout 20 --max-time 300 --retry 2 -o "$2" "$1"
  elif command -v wget >/dev/null; then wget -nv --timeout=20 --tries=3 -O "$2" "$1"
  else echo "neither curl nor wget is installed"; false; fi
}

copy() {  # copy FILE FILE; the copy has the usual permissions, not those of the source
  cat <"$1" >"$2"
}

offer() {  # offer SOURCE COMMAND...: run COMMAND, which makes $part; true if $part then has the SHA-256 $sum
  local output
  if ! output=$("${@:2}" 2>&1); then reason="cannot get $1 (${output##*$'\n'})"
  elif [ "$(sha "$part")" != "$sum" ]; then reason="$1 has another SHA-256 than the published list"
  else mv -f "$part" "$folder/$id.txt" 2>/dev/null || fail "cannot write $folder/$id.txt; check the disk"
    echo "get_splits: $id from $1"
    return 0
  fi
  return 1
}

get() {  # get ID SHA256 SOURCE...
  local id=$1 sum=$2 reason="$from has no file with SHA-256 $2" source
  if [ -f "$folder/$id.txt" ]; then
    [ "$(sha "$folder/$id.txt")" = "$sum" ] && { echo "get_splits: $id is there"; return; }
    echo "get_splits: $folder/$id.txt is not the published list: removing it"
    rm -f "$folder/$id.txt" 2>/dev/null || fail "cannot remove $folder/$id.txt; check its permissions"
  fi
  part=$folder/.$id.$$
  if [ -n "$from" ]; then
    for source in "$from"/*; do
      [ -f "$source" ] && [ "$(sha "$source")" = "$sum" ] && offer "$source" copy "$source" "$part" && return
    done
    fail "$id: $reason; without --from the list is downloaded"
  fi
  for source in "${@:3}"; do
    source=https://raw.githubusercontent.com/$source
    offer "$source" fetch "$source" "$part" && return
  done
  fail "$id: $reason; download the list in another way, then run: bash script/get_splits.sh --from DIR"
}

get simmatch-1p 90c1450521fa511c3c7e94f75c35a51bd8f63297ecc3727b85feb34d3b8652f2 \
  mingkai-zheng/SimMatch/HEAD/semi_files/split_1p_index.txt
get simmatch-10p cca8b3da723940fa66c491763ae34d4493ef2b552545cc8e83aaff3b2cb9377d \
  mingkai-zheng/SimMatch/HEAD/semi_files/split_10p_index.txt
get simclr-1p 71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17 \
  mingkai-zheng/SimMatchV2/HEAD/semi_files/split_1p_index.txt google-research/simclr/HEAD/imagenet_subsets/1percent.txt
get simclr-10p 6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091 \
  mingkai-zheng/SimMatchV2/HEAD/semi_files/split_10p_index.txt google-research/simclr/HEAD/imagenet_subsets/10percent.txt
echo "get_splits: all four lists are in $folder"
