#!/bin/busybox sh
# First process of the guest: load modules, mount the host's files below a layer in memory, run the control folder's start script.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod "$module" || echo "softroce: cannot load $module"; done

share() { mount -t 9p -o "trans=virtio,version=9p2000.L,msize=1048576,$3" "$1" "$2"; }
share rootfs /lower cache=loose,ro
mount -t tmpfs -o size=75% upper /upper
mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work root /root
for folder in proc sys dev; do mount --move /$folder /root/$folder; done
mount -t tmpfs run /root/run
mkdir -p /root/dev/shm /root/dev/pts /root/run/softroce /root/run/results
mount -t tmpfs shm /root/dev/shm
mount -t devpts pts /root/dev/pts
share control /root/run/softroce cache=none
share results /root/run/results cache=none 2>/dev/null
chroot /root /bin/sh /run/softroce/start
sync
echo o >/root/proc/sysrq-trigger
sleep 60
