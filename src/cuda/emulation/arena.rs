//! Many arrays in one allocation.

use bytemuck::Pod;

/// Where each piece begins: enough for every element.
const ALIGN: usize = 16;

/// Places slices one after the other from an address on.
pub(super) struct Arena<'a> {
    base: u64,
    len: usize,
    pieces: Vec<(usize, &'a [u8])>,
}

impl<'a> Arena<'a> {
    /// From this address on, which is aligned to 16.
    pub fn at(base: u64) -> Self {
        Self { base, len: 0, pieces: Vec::new() }
    }

    /// The address that the data will have; 0 for none.
    pub fn put<T: Pod>(&mut self, data: Option<&'a [T]>) -> u64 {
        let Some(data) = data else { return 0 };
        let offset = self.len.next_multiple_of(ALIGN);
        self.len = offset + size_of_val(data);
        self.pieces.push((offset, bytemuck::cast_slice(data)));
        self.base + offset as u64
    }

    /// Bytes that all of it takes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// What goes where, in bytes from the base.
    pub fn pieces(&self) -> &[(usize, &'a [u8])] {
        &self.pieces
    }
}
