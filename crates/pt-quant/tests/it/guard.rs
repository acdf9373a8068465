//! Buffers with a page that cannot be touched at either end: reading or writing past them ends the test.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// A buffer of `len` elements that ends where a protected page begins, or begins where one ends.
pub(crate) struct Guarded<T> {
    map: *mut u8,
    map_bytes: usize,
    start: *mut T,
    len: usize,
    elements: PhantomData<T>,
}

/// Where the buffer touches a protected page.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Side {
    /// Before the first element, moved on by this many bytes, a multiple of the element's size.
    Start(usize),
    /// Behind the last element.
    End,
}

impl<T: Copy> Guarded<T> {
    pub(crate) fn new(elements: &[T], side: Side) -> Self {
        // SAFETY: `sysconf` reads a number.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap();
        let moved = if let Side::Start(moved) = side { moved } else { 0 };
        assert!(moved.is_multiple_of(size_of::<T>()), "elements stay aligned");
        let bytes = size_of_val(elements);
        let inner = (bytes + moved).next_multiple_of(page).max(page);
        let map_bytes = inner + 2 * page;
        // SAFETY: a new private mapping, of which nothing else knows; the first and the last page lose their rights.
        let map = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = libc::mmap(std::ptr::null_mut(), map_bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert!(map != libc::MAP_FAILED, "no memory");
            let map = map.cast::<u8>();
            assert_eq!(libc::mprotect(map.cast(), page, libc::PROT_NONE), 0);
            assert_eq!(libc::mprotect(map.add(page + inner).cast(), page, libc::PROT_NONE), 0);
            map
        };
        let offset = page + if let Side::Start(moved) = side { moved } else { inner - bytes };
        // SAFETY: `bytes` from there on lie between the protected pages. Elements of up to a page's alignment are aligned: the end of a page is,
        // and so is any whole number of elements before it.
        let start = unsafe {
            let start = map.add(offset).cast::<T>();
            assert!(start.is_aligned());
            std::ptr::copy_nonoverlapping(elements.as_ptr(), start, elements.len());
            start
        };
        Self { map, map_bytes, start, len: elements.len(), elements: PhantomData }
    }
}

impl<T> Deref for Guarded<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `new` wrote that many elements there, and the mapping lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, once.
        unsafe { libc::munmap(self.map.cast(), self.map_bytes) };
    }
}
