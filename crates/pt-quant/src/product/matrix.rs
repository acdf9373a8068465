//! A 4-bit matrix in the order that products read it.

use alloc::vec;
use alloc::vec::Vec;

use crate::dense::grown;
use crate::error::check_len;
use crate::simd::product::{self, GROUP, Group, Int8Table, TILE_ROWS, Table, Tiles};
use crate::{Absmax, AbsmaxBuf, Bf16, Block4, Block4Ref, BlockSize, Codebook, Exec, QuantError, packed_len};

/// In which format a [`Block4Matrix`] holds the scales of its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScaleFormat {
    /// As they are: products use the very weights that dequantizing gives, and [`Block4Matrix::to_block4`] gives back what was put in.
    #[default]
    F32,
    /// Rounded to bf16: 0.53 instead of 0.56 bytes a weight in blocks of 64, with a relative error of each weight up to 2^-9.
    Bf16,
}

/// A 4-bit matrix `[out_features, in_features]`, the weight of a linear layer, in the order that products read it.
///
/// It holds 4 rows in one stream with their scales apart ("tiles"), which is a rearrangement of the 4-bit codes: [`from_block4`](Self::from_block4) and
/// [`to_block4`](Self::to_block4) lose nothing. A matrix whose row length is no multiple of 64, or whose blocks are of 32, is held in
/// bitsandbytes' order instead; all functions take it, slower. Scales are held once for 64 weights, also when the blocks are longer. Double
/// quantization is undone.
#[derive(Debug, Clone, PartialEq)]
pub struct Block4Matrix {
    out_features: usize,
    in_features: usize,
    block_size: BlockSize,
    codebook: Codebook,
    int8: Int8Table,
    storage: Storage,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Storage {
    Tiled(Tiled),
    Flat(Block4),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tiled {
    /// `[num_tiles, groups_per_row]`; the rows that the last tile lacks have scale zero.
    codes: Vec<Group>,
    scales: Scales,
    groups_per_row: usize,
}

/// `[num_tiles, groups_per_row]`
#[derive(Debug, Clone, PartialEq)]
enum Scales {
    F32(Vec<[f32; TILE_ROWS]>),
    Bf16(Vec<[Bf16; TILE_ROWS]>),
}

impl Block4Matrix {
    /// Takes over a tensor of `out_features · in_features` weights, row-major.
    ///
    /// # Errors
    /// [`QuantError::Length`] when the tensor has another number of weights, [`QuantError::Overflow`] for a shape that no memory holds.
    ///
    /// # Example
    /// ```
    /// use pt_quant::dense::Workspace;
    /// use pt_quant::{Absmax, Block4Matrix, Block4Ref, BlockSize, Codebook, Exec, ProductOptions, ScaleFormat};
    ///
    /// // One row of 64 weights in one block: codes 0 and 15 by turns, which are -1 and 1 in NF4, times 2.
    /// let (packed, absmax) = ([0x0f; 32], [2.0]);
    /// let weights = Block4Ref::new(&packed, Absmax::F32(&absmax), 64, BlockSize::B64, Codebook::nf4())?;
    /// let matrix = Block4Matrix::from_block4(weights, 1, 64, ScaleFormat::F32, &Exec::new())?;
    /// let (mut x, mut y) = ([0f32; 64], [0f32]);
    /// (x[0], x[1]) = (1.0, 10.0);
    /// matrix.forward(&x, &mut y, 1, &ProductOptions::default(), &mut Workspace::new(), &Exec::new())?;
    /// assert_eq!(y, [18.0]);
    /// # Ok::<(), pt_quant::QuantError>(())
    /// ```
    pub fn from_block4(
        source: Block4Ref<'_>,
        out_features: usize,
        in_features: usize,
        scale_format: ScaleFormat,
        exec: &Exec<'_>,
    ) -> Result<Self, QuantError> {
        let overflow = QuantError::Overflow { what: "out_features · in_features" };
        let len = out_features.checked_mul(in_features).ok_or(overflow)?;
        check_len("source", source.len(), len)?;
        let block_size = source.block_size();
        let storage = if len > 0 && in_features.is_multiple_of(GROUP) && block_size.get().is_multiple_of(GROUP) {
            let groups_per_row = in_features / GROUP;
            let num_groups = out_features.div_ceil(TILE_ROWS) * groups_per_row;
            let scales = match scale_format {
                ScaleFormat::F32 => Scales::F32(vec![[0.0; TILE_ROWS]; num_groups]),
                ScaleFormat::Bf16 => Scales::Bf16(vec![[Bf16(0); TILE_ROWS]; num_groups]),
            };
            Storage::Tiled(Tiled { codes: vec![Group::ZERO; num_groups], scales, groups_per_row })
        } else {
            Storage::Flat(source.to_owned())
        };
        let codebook = *source.codebook();
        let int8 = int8_table(codebook.values());
        let mut matrix = Self { out_features, in_features, block_size, codebook, int8, storage };
        matrix.fill(source, exec);
        Ok(matrix)
    }

    /// As [`from_block4`](Self::from_block4), into the memory of this matrix: nothing is allocated while the source has the same shape and block size.
    ///
    /// # Errors
    /// [`QuantError::Length`] when the tensor has another number of weights; [`QuantError::Value`] when it has another block size.
    pub fn repack(&mut self, source: Block4Ref<'_>, exec: &Exec<'_>) -> Result<(), QuantError> {
        check_len("source", source.len(), self.out_features * self.in_features)?;
        if source.block_size() != self.block_size {
            let found = alloc::format!("{}", source.block_size());
            return Err(QuantError::Value { what: "block_size", found, expected: "that of the matrix" });
        }
        self.codebook = *source.codebook();
        self.int8 = int8_table(self.codebook.values());
        self.fill(source, exec);
        Ok(())
    }

    fn fill(&mut self, source: Block4Ref<'_>, exec: &Exec<'_>) {
        let (out_features, in_features) = (self.out_features, self.in_features);
        let tiled = match &mut self.storage {
            Storage::Tiled(tiled) => tiled,
            Storage::Flat(block4) => {
                *block4 = source.to_owned();
                return;
            }
        };
        let groups = tiled.groups_per_row;
        let kernels = product::kernels(exec.isa());
        let packed = source.packed();
        let row_bytes = in_features / 2;
        let tiles_per_task = (TILE_BYTES_PER_TASK / (groups * size_of::<Group>())).max(1);
        exec.for_each_chunk(&mut tiled.codes, groups * tiles_per_task, |index, codes| {
            for (offset, codes) in codes.chunks_exact_mut(groups).enumerate() {
                let first = (index * tiles_per_task + offset) * TILE_ROWS;
                // Rows that the last tile lacks repeat one that is there; their scales are zero.
                let rows = [0, 1, 2, 3].map(|row| {
                    let row = (first + row).min(out_features - 1);
                    &packed[row * row_bytes..][..row_bytes]
                });
                (kernels.tile_rows)(&rows, codes);
            }
        });
        let absmax = RowScales { source, groups };
        match &mut tiled.scales {
            Scales::F32(scales) => fill_scales(scales, &absmax, out_features, |scale| scale, exec),
            Scales::Bf16(scales) => fill_scales(scales, &absmax, out_features, Bf16::from_f32, exec),
        }
    }

    /// The matrix in bitsandbytes' byte order, with plain scales.
    #[must_use]
    pub fn to_block4(&self, exec: &Exec<'_>) -> Block4 {
        let len = self.out_features * self.in_features;
        let mut packed = vec![0; packed_len(len)];
        let mut absmax = vec![0.0; self.block_size.num_blocks(len)];
        self.copy(&mut packed, &mut absmax, exec);
        // The lengths are those that it checks.
        Block4::new(packed, AbsmaxBuf::F32(absmax), len, self.block_size, self.codebook)
            .unwrap_or_else(|error| unreachable!("{error}"))
    }

    /// As [`to_block4`](Self::to_block4), into buffers: `packed` `[ceil(len / 2)]`, `absmax` `[ceil(len / block_size)]`.
    ///
    /// # Errors
    /// [`QuantError::Length`] when a buffer has another length.
    pub fn to_block4_into(&self, packed: &mut [u8], absmax: &mut [f32], exec: &Exec<'_>) -> Result<(), QuantError> {
        let len = self.out_features * self.in_features;
        check_len("packed", packed.len(), packed_len(len))?;
        check_len("absmax", absmax.len(), self.block_size.num_blocks(len))?;
        self.copy(packed, absmax, exec);
        Ok(())
    }

    fn copy(&self, packed: &mut [u8], absmax: &mut [f32], exec: &Exec<'_>) {
        let tiled = match &self.storage {
            Storage::Tiled(tiled) => tiled,
            Storage::Flat(block4) => {
                packed.copy_from_slice(block4.as_ref().packed());
                for (index, out) in absmax.iter_mut().enumerate() {
                    *out = block4.as_ref().absmax().get(index).unwrap_or(0.0);
                }
                return;
            }
        };
        let groups = tiled.groups_per_row;
        let kernels = product::kernels(exec.isa());
        let row_bytes = self.in_features / 2;
        let tiles_per_task = (TILE_BYTES_PER_TASK / (groups * size_of::<Group>())).max(1);
        exec.for_each_chunk(packed, TILE_ROWS * row_bytes * tiles_per_task, |index, packed| {
            let codes = tiled.codes[index * tiles_per_task * groups..].chunks_exact(groups);
            for (codes, packed) in codes.zip(packed.chunks_mut(TILE_ROWS * row_bytes)) {
                let mut rows = packed.chunks_exact_mut(row_bytes);
                let mut rows = [0; TILE_ROWS].map(|_| rows.next().unwrap_or_default());
                if rows.iter().all(|row| !row.is_empty()) {
                    (kernels.untile_rows)(codes, &mut rows);
                } else {
                    for (row, out) in rows.iter_mut().enumerate() {
                        let half = |group: &Group, byte: usize| {
                            let code = |column: usize| group.0[row / 2][column] >> (4 * (row % 2)) & 15;
                            code(2 * byte) << 4 | code(2 * byte + 1)
                        };
                        for (index, out) in out.iter_mut().enumerate() {
                            *out = half(&codes[index / (GROUP / 2)], index % (GROUP / 2));
                        }
                    }
                }
            }
        });
        let groups_per_block = self.block_size.get() / GROUP;
        if groups_per_block == 1 {
            exec.for_each_chunk(absmax, TILE_ROWS * groups * tiles_per_task, |index, absmax| {
                for (offset, absmax) in absmax.chunks_mut(TILE_ROWS * groups).enumerate() {
                    let at = (index * tiles_per_task + offset) * groups;
                    for (row, absmax) in absmax.chunks_exact_mut(groups).enumerate() {
                        match &tiled.scales {
                            Scales::F32(scales) => {
                                absmax.iter_mut().zip(&scales[at..]).for_each(|(out, scales)| *out = scales[row]);
                            }
                            Scales::Bf16(scales) => {
                                let scales = absmax.iter_mut().zip(&scales[at..]);
                                scales.for_each(|(out, scales)| *out = scales[row].to_f32());
                            }
                        }
                    }
                }
            });
            return;
        }
        for (index, out) in absmax.iter_mut().enumerate() {
            // The first group of each block, whichever row it is in.
            let group = index * groups_per_block;
            let (row, group) = (group / groups, group % groups);
            *out = tiled.scale(row / TILE_ROWS * groups + group)[row % TILE_ROWS];
        }
    }

    /// Rows: what one input gives.
    #[must_use]
    pub const fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns: the length of an input.
    #[must_use]
    pub const fn in_features(&self) -> usize {
        self.in_features
    }

    /// Weights that share a scale.
    #[must_use]
    pub const fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// What the codes stand for.
    #[must_use]
    pub const fn codebook(&self) -> &Codebook {
        &self.codebook
    }

    /// Whether it is held in tiles, which the fast kernels want.
    #[must_use]
    pub const fn is_tiled(&self) -> bool {
        matches!(self.storage, Storage::Tiled(_))
    }

    /// Bytes of its codes and scales.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        match &self.storage {
            Storage::Tiled(tiled) => {
                let scale = match tiled.scales {
                    Scales::F32(_) => size_of::<f32>(),
                    Scales::Bf16(_) => size_of::<Bf16>(),
                };
                tiled.codes.len() * (size_of::<Group>() + TILE_ROWS * scale)
            }
            Storage::Flat(block4) => {
                let block4 = block4.as_ref();
                let absmax = match block4.absmax() {
                    Absmax::F32(absmax) => size_of_val(absmax),
                    Absmax::Nested(nested) => nested.codes().len() + size_of_val(nested.absmax()),
                };
                block4.packed().len() + absmax
            }
        }
    }

    pub(super) fn storage(&self) -> &Storage {
        &self.storage
    }

    pub(super) fn table(&self, round: bool) -> Table {
        Table { values: *self.codebook.values(), round }
    }

    pub(super) fn int8(&self) -> &Int8Table {
        &self.int8
    }
}

/// The scales of a tensor, by rows of a matrix.
struct RowScales<'a> {
    source: Block4Ref<'a>,
    groups: usize,
}

impl RowScales<'_> {
    /// Calls `take` with each group of a row and its scale.
    fn of_row(&self, row: usize, mut take: impl FnMut(usize, f32)) {
        let groups_per_block = self.source.block_size().get() / GROUP;
        let first = row * self.groups;
        match self.source.absmax() {
            Absmax::F32(absmax) if groups_per_block == 1 => {
                absmax[first..first + self.groups].iter().enumerate().for_each(|(group, scale)| take(group, *scale));
            }
            absmax => {
                for group in 0..self.groups {
                    take(group, absmax.get((first + group) / groups_per_block).unwrap_or(0.0));
                }
            }
        }
    }
}

/// Fills `[num_tiles, groups_per_row]` scales of 4 rows; those of rows that are not there stay zero.
fn fill_scales<T: Send>(
    out: &mut [[T; TILE_ROWS]],
    scales: &RowScales<'_>,
    num_rows: usize,
    convert: impl Fn(f32) -> T + Sync,
    exec: &Exec<'_>,
) {
    let tiles_per_task = (TILE_BYTES_PER_TASK / (scales.groups * size_of::<Group>())).max(1);
    exec.for_each_chunk(out, scales.groups * tiles_per_task, |index, out| {
        for (offset, out) in out.chunks_exact_mut(scales.groups).enumerate() {
            let first = (index * tiles_per_task + offset) * TILE_ROWS;
            (0..TILE_ROWS.min(num_rows - first)).for_each(|row| {
                scales.of_row(first + row, |group, scale| out[group][row] = convert(scale));
            });
        }
    });
}

/// Code bytes of a task of the rearrangement: enough to make handing it out cheap.
const TILE_BYTES_PER_TASK: usize = 64 << 10;

impl Tiled {
    pub(super) fn groups_per_row(&self) -> usize {
        self.groups_per_row
    }

    fn scale(&self, index: usize) -> [f32; TILE_ROWS] {
        match &self.scales {
            Scales::F32(scales) => scales[index],
            Scales::Bf16(scales) => scales[index].map(Bf16::to_f32),
        }
    }

    /// The tiles of some rows, which start at a tile, and a range of their groups. `buffer` is for scales that must be converted.
    pub(super) fn tiles<'a>(
        &'a self,
        rows: core::ops::Range<usize>,
        groups: core::ops::Range<usize>,
        buffer: &'a mut Vec<[f32; TILE_ROWS]>,
    ) -> Tiles<'a> {
        let tiles = rows.start / TILE_ROWS * self.groups_per_row..rows.end.div_ceil(TILE_ROWS) * self.groups_per_row;
        let scales = match &self.scales {
            Scales::F32(scales) => &scales[tiles.clone()],
            Scales::Bf16(scales) => {
                let scales = &scales[tiles.clone()];
                let buffer = grown(buffer, scales.len());
                // Tiles whose groups are all asked for, or the one range of each.
                for (out, row) in
                    buffer.chunks_exact_mut(self.groups_per_row).zip(scales.chunks_exact(self.groups_per_row))
                {
                    for (out, scales) in out[groups.clone()].iter_mut().zip(&row[groups.clone()]) {
                        *out = scales.map(Bf16::to_f32);
                    }
                }
                &*buffer
            }
        };
        let codes = &self.codes[tiles];
        Tiles { codes, scales, groups_per_row: self.groups_per_row, groups: groups.into() }
    }
}

/// The integers that stand for a codebook's values, with the largest from 64 to 127: the choice with the smallest squared error.
pub(super) fn int8_table(values: &[f32; 16]) -> Int8Table {
    let largest = values.iter().fold(0f32, |largest, value| if value.abs() > largest { value.abs() } else { largest });
    let mut best = (f32::INFINITY, Int8Table { codes: [128; 16], inverse_scale: 0.0 });
    if !(largest > 0.0 && largest < f32::INFINITY) {
        return best.1;
    }
    for top in 64u8..=127 {
        let scale = f32::from(top) / largest;
        let mut error = 0.0;
        let codes = values.map(|value| {
            let scaled = value * scale;
            let nearest = (scaled + if scaled < 0.0 { -0.5 } else { 0.5 }) as i32;
            error += (nearest as f32 / scale - value) * (nearest as f32 / scale - value);
            (nearest + 128) as u8
        });
        if error < best.0 {
            best = (error, Int8Table { codes, inverse_scale: 1.0 / scale });
        }
    }
    best.1
}
