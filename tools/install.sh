#!/bin/sh
# The end of `make install`: links to the commands, the man pages, and no trace of DESTDIR in any file.
# Usage: install.sh DESTDIR PREFIX HOME_LIB; the virtual environment in DESTDIR/HOME_LIB is made already.
set -eu
destdir=$1 prefix=$2 home=$3
mkdir -p "$destdir$prefix/bin" "$destdir$prefix/share/man"
for program in "$destdir$home"/bin/* "$destdir$home"/pyvenv.cfg; do
    if test -f "$program" && ! test -L "$program" && grep -qI "$destdir$home" "$program"; then
        sed -i.old "s|$destdir$home|$home|g" "$program"
        rm "$program.old"
    fi
done
for command in bin/aa-*; do
    name=${command#bin/}
    test -x "$destdir$home/bin/$name"
    ln -sf "$home/bin/$name" "$destdir$prefix/bin/$name"
done
if test -d "$destdir$home/share/man"; then
    cp -R "$destdir$home/share/man/." "$destdir$prefix/share/man/"
fi
echo "installed: $prefix/bin/aa-*"
