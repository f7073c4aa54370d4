//! The features about packets, and which offloads of a tap they stand for.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
};

const GUEST_CSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;
const GUEST_TSO: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
const GUEST_ECN: u64 = 1 << VIRTIO_NET_F_GUEST_ECN;
const GUEST_USO: u64 = 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;

/// Features of packets in either direction that every tap serves: checksums and TCP segments left to the receiver.
pub(super) const EVERYWHERE: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | GUEST_CSUM
    | GUEST_TSO
    | GUEST_ECN;
/// The same for UDP segments, which taps serve since Linux 6.2.
pub(super) const USO: u64 = 1 << VIRTIO_NET_F_HOST_USO | GUEST_USO;

/// Everything that a tap may leave to the guest.
pub(super) const ALL_BUT_USO: libc::c_uint =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
/// UDP segments, which a tap accepts for both versions of IP or for neither.
pub(super) const TAP_USO: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// Whether packets may be larger than the MTU: segments are left to a guest with these features.
pub(super) fn has_segments(features: u64) -> bool {
    features & (GUEST_TSO | GUEST_USO) != 0
}

/// What the tap may leave to a guest that accepted `features`. A feature without those that it needs (virtio 1.2,
/// 5.1.3.1) does not count.
pub(super) fn of(features: u64) -> libc::c_uint {
    if features & GUEST_CSUM == 0 {
        return 0;
    }
    let mut flags = libc::TUN_F_CSUM;
    for (feature, flag) in [
        (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    ] {
        if features & 1 << feature != 0 {
            flags |= flag;
        }
    }
    if features & GUEST_TSO != 0 && features & GUEST_ECN != 0 {
        flags |= libc::TUN_F_TSO_ECN;
    }
    if features & GUEST_USO == GUEST_USO {
        flags |= TAP_USO;
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_needs_its_ground() {
        let (csum, tso4) = (libc::TUN_F_CSUM, libc::TUN_F_TSO4);
        assert_eq!(of(0), 0);
        assert_eq!(of(GUEST_TSO | GUEST_USO), 0);
        assert_eq!(of(GUEST_CSUM | GUEST_ECN), csum);
        assert_eq!(of(GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4), csum | tso4);
        assert_eq!(of(GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_USO4), csum);
        assert_eq!(of(EVERYWHERE), ALL_BUT_USO);
        assert_eq!(of(EVERYWHERE | USO), ALL_BUT_USO | TAP_USO);
    }
}
