//! Whether a reward model's scores mean what the Bradley–Terry model says: how often the better scored completion is
//! the better one.

/// Bins of [`Calibration::of`] that reports take.
pub const NUM_BINS: usize = 10;

/// Pairs whose predicted chance lies between two bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CalibrationBin {
    /// Pairs in the bin.
    pub count: usize,
    /// Their mean predicted chance that the better scored completion wins, 0.5 to 1.
    pub predicted: f64,
    /// The share in which it did.
    pub observed: f64,
}

/// A reliability diagram (Guo et al. 2017, <https://arxiv.org/abs/1706.04599>).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Calibration {
    /// Bins of equal width from 0.5 to 1; those without pairs are left out.
    pub bins: Vec<CalibrationBin>,
    /// Expected calibration error: the mean over pairs of |predicted − observed| of their bin.
    pub expected_error: f64,
}

impl Calibration {
    /// Of pairs' differences r_chosen − r_rejected, in `num_bins` bins.
    ///
    /// A pair predicts σ(|Δ|) that the completion with the higher score is the better one; that is observed where Δ >
    /// 0, and half observed where the scores are equal. Which side a pair calls chosen does not matter so.
    ///
    /// # Example
    /// ```
    /// use pt_rlhf::Calibration;
    /// // σ(ln 3) = 0.75, and three of four such pairs are right.
    /// let difference = 3f64.ln();
    /// let calibration = Calibration::of(&[difference, difference, -difference, difference], 10);
    /// assert_eq!(calibration.bins.len(), 1);
    /// assert!(calibration.expected_error < 1e-12);
    /// ```
    pub fn of(differences: &[f64], num_bins: usize) -> Self {
        let num_bins = num_bins.max(1);
        let mut sums = vec![(0usize, 0.0, 0.0); num_bins];
        for difference in differences {
            let predicted = 1.0 / (1.0 + (-difference.abs()).exp());
            let observed = match difference {
                difference if *difference > 0.0 => 1.0,
                difference if *difference < 0.0 => 0.0,
                _ => 0.5,
            };
            let bin = ((predicted - 0.5) * 2.0 * num_bins as f64) as usize;
            let (count, predictions, observations) = &mut sums[bin.min(num_bins - 1)];
            *count += 1;
            *predictions += predicted;
            *observations += observed;
        }
        let filled = sums.into_iter().filter(|(count, ..)| *count > 0);
        let bins: Vec<CalibrationBin> = filled
            .map(|(count, predictions, observations)| {
                let (predicted, observed) = (predictions / count as f64, observations / count as f64);
                CalibrationBin { count, predicted, observed }
            })
            .collect();
        let off: f64 = bins.iter().map(|bin| bin.count as f64 * (bin.predicted - bin.observed).abs()).sum();
        let expected_error = off / differences.len().max(1) as f64;
        Self { bins, expected_error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_is_too_sure_is_off_by_what_it_claims_too_much() {
        // Predicts 0.9 and is right half the time: off by 0.4. Predicts 0.6 and is right always: off by 0.4 as well.
        let (sure, unsure) = (9f64.ln(), 1.5f64.ln());
        let calibration = Calibration::of(&[sure, -sure, unsure, unsure], 10);
        let shown: Vec<_> = calibration.bins.iter().map(|bin| (bin.count, bin.observed)).collect();
        assert_eq!(shown, [(2, 1.0), (2, 0.5)]);
        assert!((calibration.bins[0].predicted - 0.6).abs() < 1e-12, "{calibration:?}");
        assert!((calibration.expected_error - 0.4).abs() < 1e-12, "{calibration:?}");
    }

    #[test]
    fn equal_scores_are_half_right_and_great_ones_fall_into_the_last_bin() {
        let calibration = Calibration::of(&[0.0, 1e6, f64::INFINITY], 4);
        assert_eq!(calibration.bins[0], CalibrationBin { count: 1, predicted: 0.5, observed: 0.5 });
        assert_eq!(calibration.bins[1], CalibrationBin { count: 2, predicted: 1.0, observed: 1.0 });
        assert_eq!(calibration.expected_error, 0.0);
        assert_eq!(Calibration::of(&[], 10), Calibration::default());
    }
}
