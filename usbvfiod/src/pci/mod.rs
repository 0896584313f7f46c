//! What makes the controller a PCI function: its configuration space ([`config`]) and its interrupt vectors
//! ([`msix`]). The registers behind BAR 0 are not here (`crate::xhci`).

pub mod config;
pub mod msix;

use crate::vfio_user::session::Layout;

/// Bytes behind BAR 0, the xHCI registers.
pub const REGISTERS_SIZE: u32 = 64 << 10;
/// The BAR with the MSI-X table and pending bits.
pub const MSIX_BAR: u8 = 2;
/// Bytes behind [`MSIX_BAR`]: a page for the table, a page for the pending bits.
pub const MSIX_BAR_SIZE: u32 = 2 * msix::PAGE;

/// What the vfio-user session tells the client of this function. `msix_vectors` is at most [`msix::MAX_VECTORS`].
pub fn layout(msix_vectors: u16) -> Layout {
    let mut region_sizes = [0; 9];
    region_sizes[0] = u64::from(REGISTERS_SIZE);
    region_sizes[usize::from(MSIX_BAR)] = u64::from(MSIX_BAR_SIZE);
    region_sizes[7] = config::SIZE as u64;
    Layout { region_sizes, msix_vectors: msix_vectors.clamp(1, msix::MAX_VECTORS) }
}

/// The bytes of an access that begins at `offset`, any value; they do not wrap.
fn positions(offset: u64) -> impl Iterator<Item = usize> {
    let first = usize::try_from(offset).unwrap_or(usize::MAX);
    (0..usize::MAX).map(move |index| first.saturating_add(index))
}
