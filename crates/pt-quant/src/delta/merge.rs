//! Adding a delta to its base, and taking it off again.

use alloc::vec;
use alloc::vec::Vec;

use super::{BitDeltaRef, DeltaScale, SCALE_GROUP};
use crate::block4::STREAM_BYTES;
use crate::error::check_len;
use crate::simd::delta::{self, Bits};
use crate::simd::view::{View, ViewMut};
use crate::{Element, Exec, QuantError};

/// Weights that a task takes at least.
const MIN_TASK: usize = 16 * 1024;

/// What a merge changed: the exclusive or of each weight's bits before and after. It takes as much memory as the weights.
///
/// Subtracting the delta from merged weights does not give the old ones back, since the sum was rounded; this does, bit for bit. The exclusive or undoes
/// itself, so [`toggle`](Self::toggle) switches from merged to unmerged weights and back without anything else kept.
#[derive(Debug, Clone)]
pub struct MergeBackup<T> {
    changes: Vec<T>,
}

impl<T: Element> MergeBackup<T> {
    /// Switches the weights of the merge that made this backup from merged to unmerged, or back.
    ///
    /// # Errors
    /// [`QuantError::Length`] when these are not as many weights as were merged.
    pub fn toggle(&self, weights: &mut [T], exec: &Exec<'_>) -> Result<(), QuantError> {
        check_len("weights", weights.len(), self.changes.len())?;
        exec.for_each_chunk(weights, MIN_TASK, |index, weights| {
            let changes = &self.changes[index * MIN_TASK..][..weights.len()];
            match (ViewMut::of(weights), View::of(changes)) {
                (ViewMut::F32(weights), View::F32(changes)) => apply(weights, changes),
                (ViewMut::Bf16(weights), View::Bf16(changes)) => apply(weights, changes),
                (ViewMut::F16(weights), View::F16(changes)) => apply(weights, changes),
                _ => unreachable!("both have the type T"),
            }
        });
        Ok(())
    }
}

fn apply<T: Bits>(weights: &mut [T], changes: &[T]) {
    weights.iter_mut().zip(changes).for_each(|(weight, change)| *weight = weight.xor(*change));
}

/// Calls `part(range of a row, words, scale)` for the parts of a row that have one scale.
fn for_each_scale(delta: BitDeltaRef<'_>, row: usize, mut part: impl FnMut(core::ops::Range<usize>, &[u64], f32)) {
    let (words, in_features) = (delta.signs.row(row), delta.signs.in_features());
    match delta.scale {
        DeltaScale::Matrix(scale) => part(0..in_features, words, scale),
        DeltaScale::Row(scales) => part(0..in_features, words, scales[row]),
        DeltaScale::Group128(_) => {
            for start in (0..in_features).step_by(SCALE_GROUP) {
                let scale = delta.scale.at(row, start, in_features);
                part(start..in_features.min(start + SCALE_GROUP), &words[start / 64..], scale);
            }
        }
    }
}

impl BitDeltaRef<'_> {
    /// `out = base + delta_scale · signs`, computed in f32 and rounded once to the format, ties to even.
    ///
    /// # Shapes
    /// - `base`, `out`: `[out_features, in_features]`, row-major; f32, bf16 or f16.
    ///
    /// The bits do not depend on instruction set or threads, except for the payload of a NaN. Large outputs are written past the caches.
    ///
    /// # Errors
    /// [`QuantError::Length`] when a matrix has another size.
    pub fn merge_into<T: Element>(&self, base: &[T], out: &mut [T], exec: &Exec<'_>) -> Result<(), QuantError> {
        let len = self.signs.out_features() * self.signs.in_features();
        check_len("base", base.len(), len)?;
        check_len("out", out.len(), len)?;
        let stream = size_of_val(out) >= STREAM_BYTES;
        let kernels = delta::kernels(exec.isa());
        self.for_each_rows(out, exec, |first, out| {
            for_each_scale(*self, first, |range, words, scale| {
                let base = &base[first * self.signs.in_features()..][range.clone()];
                match (View::of(base), ViewMut::of(&mut out[range])) {
                    (View::F32(base), ViewMut::F32(out)) => (kernels.merge_f32)(base, words, scale, out, stream),
                    (View::Bf16(base), ViewMut::Bf16(out)) => (kernels.merge_bf16)(base, words, scale, out, stream),
                    (View::F16(base), ViewMut::F16(out)) => (kernels.merge_f16)(base, words, scale, out, stream),
                    _ => unreachable!("both have the type T"),
                }
            });
        });
        Ok(())
    }

    /// `weights += delta_scale · signs`, as [`merge_into`](Self::merge_into), in place. What was there before is lost:
    /// [`merge_with_backup`](Self::merge_with_backup) keeps it.
    ///
    /// # Errors
    /// [`QuantError::Length`] when the matrix has another size.
    pub fn merge<T: Element>(&self, weights: &mut [T], exec: &Exec<'_>) -> Result<(), QuantError> {
        check_len("weights", weights.len(), self.signs.out_features() * self.signs.in_features())?;
        self.for_each_rows(weights, exec, |row, weights| self.merge_row(row, weights, &mut [], exec));
        Ok(())
    }

    /// As [`merge`](Self::merge), keeping what changed, so that [`MergeBackup::toggle`] gives the old weights back bit for bit.
    ///
    /// # Errors
    /// [`QuantError::Length`] when the matrix has another size.
    ///
    /// # Example
    /// ```
    /// use pt_quant::delta::{BitDelta, ScaleAxis};
    /// use pt_quant::{Bf16, Exec};
    ///
    /// let exec = Exec::new();
    /// let [base, tuned] = [[0.001, 300.0, -7.0], [0.4, 300.2, -7.3]].map(|numbers: [f32; 3]| numbers.map(Bf16::from_f32));
    /// let delta = BitDelta::fit(&base, &tuned, 1, 3, ScaleAxis::Row, &exec)?;
    /// let mut weights = base;
    /// let backup = delta.as_ref().merge_with_backup(&mut weights, &exec)?;
    /// assert_ne!(weights, base);
    /// backup.toggle(&mut weights, &exec)?;
    /// assert_eq!(weights, base);
    /// # Ok::<(), pt_quant::QuantError>(())
    /// ```
    pub fn merge_with_backup<T: Element>(
        &self,
        weights: &mut [T],
        exec: &Exec<'_>,
    ) -> Result<MergeBackup<T>, QuantError> {
        check_len("weights", weights.len(), self.signs.out_features() * self.signs.in_features())?;
        let mut changes = vec![T::from_f32(0.0); weights.len()];
        let chunk_len = self.rows_per_task() * self.signs.in_features();
        exec.for_each_chunk_pair((weights, chunk_len), (&mut changes, chunk_len), |index, weights, changes| {
            let rows = weights.chunks_mut(self.signs.in_features()).zip(changes.chunks_mut(self.signs.in_features()));
            for (row, (weights, changes)) in rows.enumerate() {
                self.merge_row(index * self.rows_per_task() + row, weights, changes, exec);
            }
        });
        Ok(MergeBackup { changes })
    }

    /// `out = delta_scale · signs`, rounded to the format.
    ///
    /// # Errors
    /// [`QuantError::Length`] when the matrix has another size.
    pub fn write_dense<T: Element>(&self, out: &mut [T], exec: &Exec<'_>) -> Result<(), QuantError> {
        check_len("out", out.len(), self.signs.out_features() * self.signs.in_features())?;
        self.for_each_rows(out, exec, |row, out| {
            for_each_scale(*self, row, |range, words, scale| {
                let both = [-scale, scale].map(T::from_f32);
                for (index, out) in out[range].iter_mut().enumerate() {
                    *out = both[(words[index / 64] >> (index % 64) & 1) as usize];
                }
            });
        });
        Ok(())
    }

    fn merge_row<T: Element>(&self, row: usize, weights: &mut [T], changes: &mut [T], exec: &Exec<'_>) {
        let kernels = delta::kernels(exec.isa());
        for_each_scale(*self, row, |range, words, scale| {
            let changes = if changes.is_empty() { &mut [] } else { &mut changes[range.clone()] };
            match (ViewMut::of(&mut weights[range]), ViewMut::of(changes)) {
                (ViewMut::F32(weights), ViewMut::F32(changes)) => {
                    (kernels.merge_in_place_f32)(weights, words, scale, changes);
                }
                (ViewMut::Bf16(weights), ViewMut::Bf16(changes)) => {
                    (kernels.merge_in_place_bf16)(weights, words, scale, changes);
                }
                (ViewMut::F16(weights), ViewMut::F16(changes)) => {
                    (kernels.merge_in_place_f16)(weights, words, scale, changes);
                }
                _ => unreachable!("both have the type T"),
            }
        });
    }

    fn rows_per_task(&self) -> usize {
        (MIN_TASK / self.signs.in_features().max(1)).max(1)
    }

    /// Calls `work(row, numbers)` for each row of a matrix of this shape.
    fn for_each_rows<T: Send>(&self, out: &mut [T], exec: &Exec<'_>, work: impl Fn(usize, &mut [T]) + Sync) {
        let (in_features, rows) = (self.signs.in_features(), self.rows_per_task());
        if in_features > 0 {
            exec.for_each_chunk(out, rows * in_features, |index, out| {
                out.chunks_mut(in_features).enumerate().for_each(|(row, out)| work(index * rows + row, out));
            });
        }
    }
}
