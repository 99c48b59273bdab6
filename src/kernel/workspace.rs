//! Carving typed slices out of a caller's bytes.

use bytemuck::AnyBitPattern;
use bytemuck::NoUninit;

/// Alignment of every carved slice: a cache line, and the widest vector.
pub const ALIGN: usize = 64;

/// Adds up what a [`Carver`] will hand out.
#[derive(Default)]
pub(super) struct Size(usize);

impl Size {
    pub fn add<T>(mut self, len: usize) -> Self {
        self.0 += (len * size_of::<T>()).next_multiple_of(ALIGN);
        self
    }

    /// Bytes, with room to align the start.
    pub fn bytes(self) -> usize {
        self.0 + ALIGN
    }
}

/// Hands out consecutive aligned slices.
pub(super) struct Carver<'a>(&'a mut [u8]);

impl<'a> Carver<'a> {
    pub fn new(bytes: &'a mut [u8]) -> Self {
        let skip = bytes.as_ptr().align_offset(ALIGN).min(bytes.len());
        Self(&mut bytes[skip..])
    }

    /// The next `len` elements; content arbitrary. The caller has checked the size.
    pub fn take<T: NoUninit + AnyBitPattern>(&mut self, len: usize) -> &'a mut [T] {
        let bytes = std::mem::take(&mut self.0);
        let used = len * size_of::<T>();
        let (mine, rest) = bytes.split_at_mut(used.next_multiple_of(ALIGN));
        self.0 = rest;
        bytemuck::cast_slice_mut(&mut mine[..used])
    }
}
