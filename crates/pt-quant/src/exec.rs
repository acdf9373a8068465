//! How a function runs: which instruction set, on whose threads.

use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::{Isa, QuantError};

/// Threads that work can be split over. Bring your own pool by implementing it.
///
/// Results do not depend on the pool or on its number of threads.
pub trait Pool: Sync {
    /// How many calls of a task can run side by side, at least 1.
    fn num_threads(&self) -> usize;

    /// Calls `task` `num_threads` times, side by side where possible, and returns when all are done. Work is taken from a
    /// shared list, so a pool that makes fewer calls is slower, not wrong.
    fn run(&self, task: &(dyn Fn() + Sync));
}

/// The calling thread alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct Inline;

impl Pool for Inline {
    fn num_threads(&self) -> usize {
        1
    }

    fn run(&self, task: &(dyn Fn() + Sync)) {
        task();
    }
}

/// The rayon pool that is current where the function is called.
#[cfg(feature = "rayon")]
#[derive(Debug, Clone, Copy, Default)]
pub struct Rayon;

#[cfg(feature = "rayon")]
impl Pool for Rayon {
    fn num_threads(&self) -> usize {
        rayon::current_num_threads()
    }

    fn run(&self, task: &(dyn Fn() + Sync)) {
        rayon::scope(|scope| {
            for _ in 1..rayon::current_num_threads() {
                scope.spawn(|_| task());
            }
            task();
        });
    }
}

/// An instruction set and a pool: the last argument of everything that computes.
#[derive(Clone, Copy)]
pub struct Exec<'a> {
    /// Available on this processor; only [`Exec::with_isa`] sets it, after a check. Kernels rely on it.
    isa: Isa,
    pool: &'a dyn Pool,
}

impl Exec<'static> {
    /// The instruction set of [`Isa::detect`], on rayon's threads with the feature `rayon`, on the calling thread without.
    #[must_use]
    pub fn new() -> Self {
        #[cfg(feature = "rayon")]
        return Self { isa: Isa::detect(), pool: &Rayon };
        #[cfg(not(feature = "rayon"))]
        return Self::single();
    }

    /// The instruction set of [`Isa::detect`] on the calling thread.
    #[must_use]
    pub fn single() -> Self {
        Self { isa: Isa::detect(), pool: &Inline }
    }
}

impl Default for Exec<'static> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> Exec<'a> {
    /// With another instruction set.
    ///
    /// # Errors
    /// [`QuantError::Isa`] when this processor lacks it.
    pub fn with_isa(self, isa: Isa) -> Result<Self, QuantError> {
        if isa.is_available() { Ok(Self { isa, ..self }) } else { Err(QuantError::Isa { isa }) }
    }

    /// On another pool.
    #[must_use]
    pub fn with_pool<'b>(self, pool: &'b dyn Pool) -> Exec<'b> {
        Exec { isa: self.isa, pool }
    }

    /// The instruction set; available on this processor.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads of the pool.
    #[must_use]
    pub fn num_threads(&self) -> usize {
        self.pool.num_threads().max(1)
    }

    /// Calls `work` once for each of `0..num_tasks`, on all threads.
    pub(crate) fn for_each(&self, num_tasks: usize, work: impl Fn(usize) + Sync) {
        self.for_each_with(num_tasks, &mut vec_of_units(self.num_slots()), |index, ()| work(index));
    }

    /// How many slots of scratch [`for_each_with`](Self::for_each_with) can use: one a thread.
    pub(crate) fn num_slots(&self) -> usize {
        // The calling thread takes part after the pool is done, in case the pool made no call.
        match self.num_threads() {
            1 => 1,
            threads => threads + 1,
        }
    }

    /// Calls `work` once for each of `0..num_tasks`, on as many threads as there are `slots` of scratch; each thread works in a slot of its own.
    pub(crate) fn for_each_with<S: Send>(
        &self,
        num_tasks: usize,
        slots: &mut [S],
        work: impl Fn(usize, &mut S) + Sync,
    ) {
        let Some((own, others)) = slots.split_first_mut() else {
            assert_eq!(num_tasks, 0, "work needs a slot");
            return;
        };
        if num_tasks <= 1 || self.num_threads() == 1 {
            (0..num_tasks).for_each(|index| work(index, own));
            return;
        }
        let (next, next_slot, num_others) = (AtomicUsize::new(0), AtomicUsize::new(0), others.len());
        let take = |slot: &mut S| {
            loop {
                // Each index is handed out once, whatever the pool does: what is split by it below may be `&mut`.
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= num_tasks {
                    return;
                }
                work(index, slot);
            }
        };
        let others = Chunks::new(others, 1);
        self.pool.run(&|| {
            let slot = next_slot.fetch_add(1, Ordering::Relaxed);
            if slot < num_others {
                // SAFETY: the counter gives out each slot once; `others` is borrowed until the pool has returned.
                take(unsafe { &mut others.get(slot)[0] });
            }
        });
        take(own);
    }

    /// Splits `out` into chunks of `chunk_len` (the last may be shorter) and calls `work(index, chunk)` once for each.
    pub(crate) fn for_each_chunk<T: Send>(
        &self,
        out: &mut [T],
        chunk_len: usize,
        work: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let chunks = Chunks::new(out, chunk_len);
        self.for_each(chunks.num_chunks(), |index| {
            // SAFETY: `for_each` hands out each index once, so no two chunks overlap; `out` is borrowed until it returns.
            work(index, unsafe { chunks.get(index) });
        });
    }

    /// Splits two outputs side by side, as [`for_each_chunk`](Self::for_each_chunk) does; both must make the same number of chunks.
    pub(crate) fn for_each_chunk_pair<T: Send, U: Send>(
        &self,
        (first, first_len): (&mut [T], usize),
        (second, second_len): (&mut [U], usize),
        work: impl Fn(usize, &mut [T], &mut [U]) + Sync,
    ) {
        let (first, second) = (Chunks::new(first, first_len), Chunks::new(second, second_len));
        assert_eq!(first.num_chunks(), second.num_chunks(), "both outputs make the same number of chunks");
        self.for_each(first.num_chunks(), |index| {
            // SAFETY: as in `for_each_chunk`, for each of two buffers that are borrowed apart.
            work(index, unsafe { first.get(index) }, unsafe { second.get(index) });
        });
    }

    /// Splits the columns of a row-major matrix `out` of `num_columns` columns into blocks of `block_len` (the last may be narrower) and
    /// calls `work(first_column, block, slot)` once for each. This is how products are split over the rows of their weight.
    pub(crate) fn for_each_columns<T: Send, S: Send>(
        &self,
        (out, num_columns): (&mut [T], usize),
        block_len: usize,
        slots: &mut [S],
        work: impl Fn(usize, Columns<'_, T>, &mut S) + Sync,
    ) {
        let block_len = block_len.max(1);
        let num_rows = out.len().checked_div(num_columns).unwrap_or(0);
        // The whole matrix is one chunk, of which each task gets its own columns.
        let whole = Chunks::new(out, usize::MAX);
        self.for_each_with(num_columns.div_ceil(block_len), slots, |index, slot| {
            let first = index * block_len;
            let len = block_len.min(num_columns - first);
            work(first, Columns { whole: &whole, num_rows, num_columns, first, len }, slot);
        });
    }
}

impl fmt::Debug for Exec<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Exec").field("isa", &self.isa).field("num_threads", &self.num_threads()).finish()
    }
}

/// A mutable slice cut into chunks that several threads take apart from each other.
struct Chunks<'a, T> {
    start: *mut T,
    len: usize,
    chunk_len: usize,
    lifetime: core::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: shared among threads only to hand out chunks that do not overlap (`get`), each to one thread, as `&mut [T]` of
// a `T: Send` may be.
unsafe impl<T: Send> Sync for Chunks<'_, T> {}

impl<'a, T> Chunks<'a, T> {
    fn new(out: &'a mut [T], chunk_len: usize) -> Self {
        let chunk_len = chunk_len.max(1);
        Self { start: out.as_mut_ptr(), len: out.len(), chunk_len, lifetime: core::marker::PhantomData }
    }

    fn num_chunks(&self) -> usize {
        self.len.div_ceil(self.chunk_len)
    }

    /// # Safety
    /// Each index at most once while any chunk is alive, and `index < num_chunks()`.
    #[allow(clippy::mut_from_ref)]
    unsafe fn get(&self, index: usize) -> &mut [T] {
        let start = index * self.chunk_len;
        debug_assert!(start < self.len);
        // SAFETY: `start < len`, and the length stops at the end of the slice that `new` borrowed; the caller keeps
        // chunks from being handed out twice.
        unsafe { core::slice::from_raw_parts_mut(self.start.add(start), self.chunk_len.min(self.len - start)) }
    }
}

/// Slots for work that needs none. Units take no memory, so nothing is allocated.
fn vec_of_units(len: usize) -> alloc::vec::Vec<()> {
    alloc::vec![(); len]
}

/// Some neighbouring columns of a row-major matrix, which no other thread touches; made by [`Exec::for_each_columns`].
pub(crate) struct Columns<'a, T> {
    whole: &'a Chunks<'a, T>,
    num_rows: usize,
    num_columns: usize,
    first: usize,
    len: usize,
}

impl<T> Columns<'_, T> {
    /// Columns in the block.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Rows of the matrix.
    pub(crate) fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// The block's part of a row.
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.num_rows, "row {row} of {}", self.num_rows);
        let start = row * self.num_columns + self.first;
        // SAFETY: `row < num_rows` and `first + len <= num_columns`, so the slice lies in the matrix; blocks are handed out once
        // (`for_each`) and have no column in common, and `&mut self` keeps two rows of one block from living at once.
        unsafe { core::slice::from_raw_parts_mut(self.whole.start.add(start), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;
    use alloc::vec::Vec;

    use super::*;

    struct Threads(usize);

    impl Pool for Threads {
        fn num_threads(&self) -> usize {
            self.0
        }

        fn run(&self, task: &(dyn Fn() + Sync)) {
            std::thread::scope(|scope| {
                for _ in 0..self.0 {
                    scope.spawn(task);
                }
            });
        }
    }

    /// Makes no call at all.
    struct Lazy;

    impl Pool for Lazy {
        fn num_threads(&self) -> usize {
            4
        }

        fn run(&self, _: &(dyn Fn() + Sync)) {}
    }

    #[test]
    fn every_chunk_is_worked_on_once_whatever_the_pool_does() {
        let pools: [&dyn Pool; 4] = [&Inline, &Threads(2), &Threads(7), &Lazy];
        for pool in pools {
            for len in [0, 1, 5, 64, 1000] {
                let mut out = vec![0u32; len];
                Exec::single().with_pool(pool).for_each_chunk(&mut out, 7, |index, chunk| {
                    chunk.iter_mut().enumerate().for_each(|(offset, value)| *value += (index * 7 + offset + 1) as u32);
                });
                assert_eq!(out, (1..=len as u32).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn no_two_threads_share_a_slot() {
        let pools: [&dyn Pool; 4] = [&Inline, &Threads(2), &Threads(7), &Lazy];
        for pool in pools {
            let exec = Exec::single().with_pool(pool);
            for num_slots in 1..=exec.num_slots() + 1 {
                let mut slots = vec![0u64; num_slots];
                exec.for_each_with(1000, &mut slots, |index, sum| *sum += index as u64);
                assert_eq!(slots.iter().sum::<u64>(), 999 * 1000 / 2);
            }
        }
    }

    #[test]
    fn blocks_of_columns_cover_the_matrix_once() {
        for (num_rows, num_columns, block_len) in [(0, 5, 2), (3, 0, 2), (1, 1, 4), (3, 7, 2), (4, 8, 8), (5, 9, 1)] {
            let mut out = vec![0u32; num_rows * num_columns];
            Exec::single().with_pool(&Threads(3)).for_each_columns(
                (&mut out, num_columns),
                block_len,
                &mut [(); 2],
                |first, mut block, ()| {
                    assert!(block.len() <= block_len && block.num_rows() == num_rows);
                    for row in 0..num_rows {
                        for (offset, value) in block.row(row).iter_mut().enumerate() {
                            *value += (row * num_columns + first + offset + 1) as u32;
                        }
                    }
                },
            );
            assert_eq!(out, (1..=(num_rows * num_columns) as u32).collect::<Vec<_>>());
        }
    }
}
