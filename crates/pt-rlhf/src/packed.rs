//! Packed values: one slice or `[num_tokens]` tensor, sequence after sequence, with the length of each.

use crate::error::{Result, RlhfError};
use pt_tensor::{Device, Kind, Tensor};
use std::ops::Range;

/// Where each sequence's entries are.
pub(crate) fn ranges(lengths: &[usize]) -> impl Iterator<Item = Range<usize>> + '_ {
    lengths.iter().scan(0, |end, length| {
        let start = *end;
        *end += length;
        Some(start..*end)
    })
}

/// That something holds as many entries as it should.
pub(crate) fn check_count(what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(RlhfError::length(what, found, expected)) }
}

/// That a packed slice holds as many entries as its sequences.
pub(crate) fn check_total(what: &'static str, found: usize, lengths: &[usize]) -> Result<()> {
    check_count(what, found, lengths.iter().sum())
}

/// That a tensor is `[num_entries]` and holds floats.
pub(crate) fn check_floats(what: &'static str, column: &Tensor, num_entries: i64) -> Result<()> {
    if column.size() == [num_entries] && column.is_floating_point() {
        return Ok(());
    }
    let expected = if num_entries < 0 { "one axis of floats".into() } else { format!("[{num_entries}] of floats") };
    Err(RlhfError::shape(what, column, expected))
}

/// Entries of a column; of what has no dimensions or several, a number that no column can have.
pub(crate) fn num_entries(column: &Tensor) -> i64 {
    if column.dim() == 1 { column.size()[0] } else { -1 }
}

/// f32, or f64 where it was.
pub(crate) fn wide(tensor: &Tensor) -> Tensor {
    if tensor.kind() == Kind::Double { tensor.shallow_clone() } else { tensor.to_kind(Kind::Float) }
}

/// The sequence that each token belongs to, `[num_tokens]` i64.
pub(crate) fn sequence_ids(lengths: &[usize], device: Device) -> Tensor {
    let ids: Vec<i64> =
        lengths.iter().enumerate().flat_map(|(id, length)| std::iter::repeat_n(id as i64, *length)).collect();
    Tensor::from_slice(&ids).to_device(device)
}

/// `[num_tokens]` to `[num_sequences]`: the sum over each sequence, 0 of an empty one.
pub(crate) fn sum_by_sequence(tokens: &Tensor, lengths: &[usize]) -> Tensor {
    let zeros = Tensor::zeros([lengths.len() as i64], (tokens.kind(), tokens.device()));
    zeros.index_add(0, &sequence_ids(lengths, tokens.device()), tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_sums_step_over_empty_sequences() {
        assert_eq!(ranges(&[2, 0, 3]).collect::<Vec<_>>(), [0..2, 2..2, 2..5]);
        let tokens = Tensor::from_slice(&[1f32, 2.0, 4.0, 8.0, 16.0]);
        assert_eq!(Vec::<f32>::try_from(sum_by_sequence(&tokens, &[2, 0, 3])).unwrap(), [3.0, 0.0, 28.0]);
        assert_eq!(sum_by_sequence(&tokens.narrow(0, 0, 0), &[]).size(), [0]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let error = check_total("values", 4, &[2, 3]).unwrap_err().to_string();
        assert_eq!(error, "`values` is of length 4, expected length 5");
        let error = check_floats("values", &Tensor::from_slice(&[1i64, 2]), 2).unwrap_err().to_string();
        assert_eq!(error, "`values` is [2] of Int64, expected [2] of floats");
        let square = Tensor::from_slice(&[0f32; 4]).view([2, 2]);
        let error = check_floats("values", &square, num_entries(&square)).unwrap_err().to_string();
        assert_eq!(error, "`values` is [2, 2] of Float, expected one axis of floats");
    }
}
