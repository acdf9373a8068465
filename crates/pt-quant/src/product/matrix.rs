//! A 4-bit matrix in the order that products read it.

use alloc::vec;
use alloc::vec::Vec;

use super::scales::{ScaleFormat, Scales, tiles_per_task};
use crate::error::check_len;
use crate::simd::product::{self, GROUP, Group, Int8Table, TILE_ROWS, Table, Tiles};
use crate::{Absmax, AbsmaxBuf, Block4, Block4Ref, BlockSize, Codebook, Exec, QuantError, packed_len};

/// A 4-bit matrix `[out_features, in_features]`, the weight of a linear layer, in the order that products read it.
///
/// It holds 4 rows in one stream with their scales apart ("tiles"), which is a rearrangement of the 4-bit codes: [`from_block4`](Self::from_block4) and
/// [`to_block4`](Self::to_block4) lose nothing. A matrix whose row length is no multiple of 64, or whose blocks are of 32, is held in
/// bitsandbytes' order instead; all functions take it, slower. Scales are held once for 64 weights, also when the blocks are longer, in a
/// [`ScaleFormat`].
#[derive(Debug, Clone, PartialEq)]
pub struct Block4Matrix {
    out_features: usize,
    in_features: usize,
    block_size: BlockSize,
    codebook: Codebook,
    int8: Int8Table,
    scale_format: ScaleFormat,
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
            Storage::Tiled(Tiled { codes: vec![Group::ZERO; num_groups], scales: Scales::default(), groups_per_row })
        } else {
            Storage::Flat(source.to_owned())
        };
        let codebook = *source.codebook();
        let int8 = int8_table(codebook.values());
        let mut matrix = Self { out_features, in_features, block_size, codebook, int8, scale_format, storage };
        matrix.fill(source, exec);
        Ok(matrix)
    }

    /// As [`from_block4`](Self::from_block4), into the memory of this matrix: nothing is allocated while the source has the same shape and block
    /// size, and its scales the same format.
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
        let tiles_per_task = tiles_per_task(groups);
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
        tiled.scales.fill(self.scale_format, source, (out_features, groups), exec);
    }

    /// The matrix in bitsandbytes' byte order, with plain scales, or with those in 8 bits that [`ScaleFormat::AsStored`] kept.
    #[must_use]
    pub fn to_block4(&self, exec: &Exec<'_>) -> Block4 {
        let len = self.out_features * self.in_features;
        let num_blocks = self.block_size.num_blocks(len);
        let nested = match &self.storage {
            Storage::Tiled(tiled) => tiled.scales.to_nested(self.groups(tiled), num_blocks),
            Storage::Flat(block4) if self.scale_format == ScaleFormat::AsStored => return block4.clone(),
            Storage::Flat(_) => None,
        };
        let mut packed = vec![0; packed_len(len)];
        self.copy_codes(&mut packed, exec);
        let absmax = nested.map_or_else(
            || {
                let mut absmax = vec![0.0; num_blocks];
                self.copy_absmax(&mut absmax, exec);
                AbsmaxBuf::F32(absmax)
            },
            AbsmaxBuf::Nested,
        );
        // The lengths are those that it checks.
        Block4::new(packed, absmax, len, self.block_size, self.codebook).unwrap_or_else(|error| unreachable!("{error}"))
    }

    /// As [`to_block4`](Self::to_block4) with plain scales, into buffers: `packed` `[ceil(len / 2)]`, `absmax` `[ceil(len / block_size)]`.
    ///
    /// # Errors
    /// [`QuantError::Length`] when a buffer has another length.
    pub fn to_block4_into(&self, packed: &mut [u8], absmax: &mut [f32], exec: &Exec<'_>) -> Result<(), QuantError> {
        let len = self.out_features * self.in_features;
        check_len("packed", packed.len(), packed_len(len))?;
        check_len("absmax", absmax.len(), self.block_size.num_blocks(len))?;
        self.copy_codes(packed, exec);
        self.copy_absmax(absmax, exec);
        Ok(())
    }

    /// Groups of a row and of a block.
    fn groups(&self, tiled: &Tiled) -> (usize, usize) {
        (tiled.groups_per_row, self.block_size.get() / GROUP)
    }

    fn copy_absmax(&self, absmax: &mut [f32], exec: &Exec<'_>) {
        match &self.storage {
            Storage::Tiled(tiled) => tiled.scales.copy_blocks(self.groups(tiled), absmax, exec),
            Storage::Flat(block4) => {
                for (index, out) in absmax.iter_mut().enumerate() {
                    *out = block4.as_ref().absmax().get(index).unwrap_or(0.0);
                }
            }
        }
    }

    fn copy_codes(&self, packed: &mut [u8], exec: &Exec<'_>) {
        let tiled = match &self.storage {
            Storage::Tiled(tiled) => tiled,
            Storage::Flat(block4) => return packed.copy_from_slice(block4.as_ref().packed()),
        };
        let groups = tiled.groups_per_row;
        let kernels = product::kernels(exec.isa());
        let row_bytes = self.in_features / 2;
        let tiles_per_task = tiles_per_task(groups);
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

    /// Whether its scales are held in 8 bits, as double quantization gave them.
    #[must_use]
    pub fn has_nested_scales(&self) -> bool {
        match &self.storage {
            Storage::Tiled(tiled) => matches!(tiled.scales, Scales::Nested(_)),
            Storage::Flat(block4) => matches!(block4.as_ref().absmax(), Absmax::Nested(_)),
        }
    }

    /// Bytes of its codes and scales.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        match &self.storage {
            Storage::Tiled(tiled) => size_of_val(&tiled.codes[..]) + tiled.scales.num_bytes(),
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

impl Tiled {
    pub(super) fn groups_per_row(&self) -> usize {
        self.groups_per_row
    }

    /// The tiles of some rows, which start at a tile, and a range of their groups. `buffer` is for scales that must be converted.
    pub(super) fn tiles<'a>(
        &'a self,
        rows: core::ops::Range<usize>,
        groups: core::ops::Range<usize>,
        buffer: &'a mut Vec<[f32; TILE_ROWS]>,
    ) -> Tiles<'a> {
        let tiles = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
        let scales = self.scales.of_tiles(tiles.clone(), groups.clone(), self.groups_per_row, buffer);
        let codes = &self.codes[tiles.start * self.groups_per_row..tiles.end * self.groups_per_row];
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
