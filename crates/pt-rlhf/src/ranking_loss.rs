//! Losses of rankings as functions of scores.

use crate::{RankingLoss, Result, RewardConfig, RlhfError};
use pt_tensor::{Kind, Tensor};
use pt_train::data::{Judgement, Pair};

/// −log σ(r_c − r_r − margin) of each pair, `[num_pairs]`: the Bradley–Terry likelihood that the chosen completion
/// wins.
///
/// Eq. 1 of Ouyang et al. 2022, <https://arxiv.org/abs/2203.02155>; the margin is that of Touvron et al. 2023, Eq. 2,
/// <https://arxiv.org/abs/2307.09288>.
///
/// # Shapes
/// `chosen_scores`, `rejected_scores`, `margins`: `[num_pairs]`; the result has the scores' kind.
///
/// # Errors
/// [`RlhfError::Shape`] when they differ in length.
///
/// # Example
/// Equal scores pay ln 2.
/// ```
/// use pt_rlhf::pairwise_losses;
/// use pt_tensor::Tensor;
/// let scores = Tensor::from_slice(&[0.5f32, -3.0]);
/// let losses = pairwise_losses(&scores, &scores, None)?;
/// assert!((losses.double_value(&[1]) - 2f64.ln()).abs() < 1e-6);
/// # Ok::<(), pt_rlhf::RlhfError>(())
/// ```
pub fn pairwise_losses(chosen_scores: &Tensor, rejected_scores: &Tensor, margins: Option<&Tensor>) -> Result<Tensor> {
    check_pairs(chosen_scores, rejected_scores)?;
    let difference = chosen_scores - rejected_scores;
    let Some(margins) = margins else { return Ok(-difference.log_sigmoid()) };
    if margins.size() != difference.size() {
        return Err(RlhfError::shape("margins", margins, format!("{:?}", difference.size())));
    }
    let kind = difference.kind();
    Ok(-(difference - margins.to_kind(kind)).log_sigmoid())
}

/// (r_c + r_r)² of each pair, `[num_pairs]`: a likelihood of differences leaves the level of all scores free, and this
/// holds it at 0 (Eisenstein et al. 2023, <https://arxiv.org/abs/2312.09244>).
///
/// # Errors
/// As [`pairwise_losses`].
pub fn centering_losses(chosen_scores: &Tensor, rejected_scores: &Tensor) -> Result<Tensor> {
    check_pairs(chosen_scores, rejected_scores)?;
    Ok((chosen_scores + rejected_scores).square())
}

/// Negative log-likelihood of one prompt's ranking, a scalar: from the best on, each completion wins against all that
/// are ranked worse (Plackett 1975, Luce 1959; ListMLE of Xia et al. 2008).
///
/// L = mean over i of −log( exp r_i / (exp r_i + Σ over j worse than i of exp r_j) ), over the completions i that some
/// are worse than.
///
/// Ties: tied completions are not compared. Each of them wins against the worse ones only, so two of one rank at the
/// top of a list give two contests, and a list of ties none and the loss 0. (Breslow's and Efron's forms would have
/// tied ones compete, and pull their scores together; a tie in our data is no judgement that both are equally good.)
/// The mean over contests, where the likelihood has their sum, lets a long list weigh as much as a pair, as in
/// [`ranking_losses`].
///
/// # Shapes
/// `scores`: `[num_completions]`, one a rank; `ranks`: 0 the best.
///
/// # Errors
/// [`RlhfError::Shape`] when they differ in length.
pub fn plackett_luce_loss(scores: &Tensor, ranks: &[u32]) -> Result<Tensor> {
    let count = ranks.len() as i64;
    if scores.size() != [count] {
        return Err(RlhfError::shape("scores", scores, format!("[{count}], one for each rank")));
    }
    let winners: Vec<i64> = (0..count).filter(|&i| ranks.iter().any(|rank| *rank > ranks[i as usize])).collect();
    if winners.is_empty() {
        return Ok(scores.sum(scores.kind()) * 0.0);
    }
    let is_outside = |winner: usize, other: usize| winner != other && ranks[other] <= ranks[winner];
    let outside: Vec<bool> = winners
        .iter()
        .flat_map(|&winner| (0..ranks.len()).map(move |other| is_outside(winner as usize, other)))
        .collect();
    let outside = Tensor::from_slice(&outside).view([winners.len() as i64, count]).to_device(scores.device());
    let contests = scores.unsqueeze(0).masked_fill(&outside, f64::NEG_INFINITY); // [num_winners, num_completions]
    let won = scores.index_select(0, &Tensor::from_slice(&winners).to_device(scores.device())); // [num_winners]
    Ok((contests.logsumexp([1i64], false) - won).mean(scores.kind()))
}

/// Losses of the prompts of a batch, and the scores of their pairs.
#[derive(Debug)]
pub struct RankingOutput {
    /// What is minimised of each prompt, `[num_prompts]`; 0 where nothing is preferred.
    pub losses: Tensor,
    /// Score of the better completion of each pair, prompt by prompt, `[num_pairs]`, without a gradient.
    pub chosen_scores: Tensor,
    /// Score of the worse one.
    pub rejected_scores: Tensor,
    /// The prompt of each pair, `[num_pairs]`.
    pub prompt_of_pair: Vec<usize>,
}

/// Losses of prompts whose completions were ranked.
///
/// `pairwise`: the mean of [`pairwise_losses`] over all pairs of different ranks of a prompt, which InstructGPT takes
/// of K completions (Ouyang et al. 2022, Eq. 1): they are scored once, in one forward pass, and a prompt weighs the
/// same however many completions it has. Ties give no pair. `plackett_luce`: [`plackett_luce_loss`]. Centring is
/// averaged over the same pairs. On pairs, the mean over prompts is the loss of TRL's `RewardTrainer`.
///
/// # Shapes
/// `scores`: `[num_completions]`, those of all prompts end to end, f32 or f64.
///
/// # Errors
/// [`RlhfError::Shape`] when there are not as many scores as ranks, and for labels, which rank nothing.
pub fn ranking_losses(scores: &Tensor, judgements: &[&Judgement], config: &RewardConfig) -> Result<RankingOutput> {
    let (kind, device) = (scores.kind(), scores.device());
    let mut all_ranks = Vec::new();
    for judgement in judgements {
        let Judgement::Ranks { ranks, .. } = judgement else {
            let (found, expected) = ("labels of single completions".into(), "ranks, or pairs".into());
            return Err(RlhfError::Shape { what: "judgement", found, expected });
        };
        all_ranks.push(ranks.as_slice());
    }
    let num_completions: usize = all_ranks.iter().map(|ranks| ranks.len()).sum();
    if scores.size() != [num_completions as i64] {
        return Err(RlhfError::shape("scores", scores, format!("[{num_completions}], one for each rank")));
    }
    let (mut chosen, mut rejected, mut margins) = (Vec::new(), Vec::new(), Vec::new());
    let (mut prompt_of_pair, mut shares) = (Vec::new(), Vec::new());
    let mut first = 0;
    for (prompt, (judgement, ranks)) in judgements.iter().zip(&all_ranks).enumerate() {
        let pairs = judgement.pairs();
        for Pair { chosen: one, rejected: other, margin } in &pairs {
            chosen.push((first + one) as i64);
            rejected.push((first + other) as i64);
            margins.push(*margin);
            prompt_of_pair.push(prompt);
            shares.push(1.0 / pairs.len() as f64);
        }
        first += ranks.len();
    }
    let take = |side: &[i64]| scores.index_select(0, &Tensor::from_slice(side).to_device(device)); // [num_pairs]
    let column = |values: &[f64]| Tensor::from_slice(values).to_kind(kind).to_device(device);
    let (chosen_scores, rejected_scores) = (take(&chosen), take(&rejected));
    let prompts: Vec<i64> = prompt_of_pair.iter().map(|&prompt| prompt as i64).collect();
    let prompts = Tensor::from_slice(&prompts).to_device(device);
    // Mean over the pairs of each prompt, [num_prompts].
    let mean_of_pairs = |terms: Tensor| {
        let none = Tensor::zeros([judgements.len() as i64], (kind, device));
        none.index_add(0, &prompts, &(terms * column(&shares)))
    };
    let mut losses = match config.loss {
        RankingLoss::Pairwise => {
            let margins = config.use_margin.then(|| column(&margins));
            mean_of_pairs(pairwise_losses(&chosen_scores, &rejected_scores, margins.as_ref())?)
        }
        RankingLoss::PlackettLuce => {
            let counts: Vec<i64> = all_ranks.iter().map(|ranks| ranks.len() as i64).collect();
            let lists = scores.split_with_sizes(counts, 0);
            let of_lists = lists.iter().zip(&all_ranks).map(|(scores, ranks)| plackett_luce_loss(scores, ranks));
            Tensor::stack(&of_lists.collect::<Result<Vec<_>>>()?, 0)
        }
    };
    if let Some(factor) = config.center_rewards_coefficient {
        losses += mean_of_pairs(centering_losses(&chosen_scores, &rejected_scores)?) * factor;
    }
    let (chosen_scores, rejected_scores) = (chosen_scores.detach(), rejected_scores.detach());
    Ok(RankingOutput { losses, chosen_scores, rejected_scores, prompt_of_pair })
}

fn check_pairs(chosen_scores: &Tensor, rejected_scores: &Tensor) -> Result<()> {
    if chosen_scores.dim() != 1 || !matches!(chosen_scores.kind(), Kind::Float | Kind::Double) {
        return Err(RlhfError::shape("chosen_scores", chosen_scores, "[num_pairs] of Float or Double"));
    }
    if rejected_scores.size() != chosen_scores.size() {
        let expected = format!("{:?}, as `chosen_scores`", chosen_scores.size());
        return Err(RlhfError::shape("rejected_scores", rejected_scores, expected));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f64::consts::LN_2;

    fn scores(values: &[f64]) -> Tensor {
        Tensor::from_slice(values)
    }

    fn ranks(ranks: &[u32]) -> Judgement {
        Judgement::Ranks { ranks: ranks.into(), scores: None }
    }

    fn scored(ranks: &[u32], scores: &[f64]) -> Judgement {
        Judgement::Ranks { ranks: ranks.into(), scores: Some(scores.into()) }
    }

    fn values(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
    }

    /// ln(1 + e^x), so −log σ(−x).
    fn softplus(x: f64) -> f64 {
        x.exp().ln_1p()
    }

    #[track_caller]
    fn assert_near(found: &[f64], expected: &[f64]) {
        let is_near = |(found, expected): (&f64, &f64)| (found - expected).abs() < 1e-12;
        assert!(found.len() == expected.len() && found.iter().zip(expected).all(is_near), "{found:?}, {expected:?}");
    }

    fn losses(config: &RewardConfig, values_in: &[f64], judgements: &[Judgement]) -> Vec<f64> {
        let judgements: Vec<&Judgement> = judgements.iter().collect();
        values(&ranking_losses(&scores(values_in), &judgements, config).unwrap().losses)
    }

    #[test]
    fn a_pair_pays_by_how_far_its_scores_part() {
        let (chosen, rejected) = (scores(&[1.0, 2.0, -1.0, 800.0]), scores(&[1.0, 0.0, 1.0, -800.0]));
        // ln 2; ln(1 + e⁻²) = 0.126928; ln(1 + e²) = 2.126928; 0.
        let plain = values(&pairwise_losses(&chosen, &rejected, None).unwrap());
        assert_near(&plain, &[LN_2, 0.126_928_011_042_972_5, 2.126_928_011_042_972_5, 0.0]);
        // A margin of 2 makes the second a pair of equals.
        let margins = scores(&[0.0, 2.0, 0.0, 0.0]);
        assert_near(&values(&pairwise_losses(&chosen, &rejected, Some(&margins)).unwrap())[1..2], &[LN_2]);
        // Far apart the wrong way round: −log σ(−1600) is 1600, not infinite.
        assert_near(&values(&pairwise_losses(&rejected, &chosen, None).unwrap())[3..], &[1600.0]);
        assert_near(&values(&centering_losses(&chosen, &rejected).unwrap())[..3], &[4.0, 4.0, 0.0]);
    }

    #[test]
    fn a_list_is_the_mean_over_its_pairs_and_ties_give_none() {
        // Ranks 1, 0, 1, 2 of scores 0, 1, 3, −1: pairs (1, 0), (1, 2), (1, 3), (0, 3), (2, 3), with differences
        // 1, −2, 2, 1, 4.
        let list = ranks(&[1, 0, 1, 2]);
        let mean = [1.0, -2.0, 2.0, 1.0, 4.0].map(|difference: f64| softplus(-difference)).iter().sum::<f64>() / 5.0;
        let config = RewardConfig::default();
        assert_near(&losses(&config, &[0.0, 1.0, 3.0, -1.0], std::slice::from_ref(&list)), &[mean]);
        // A prompt counts once, whatever its pairs: beside a pair and a tie.
        let all = [list, ranks(&[0, 1]), ranks(&[0, 0])];
        let found = losses(&config, &[0.0, 1.0, 3.0, -1.0, 2.0, 0.0, 5.0, 6.0], &all);
        assert_near(&found, &[mean, softplus(-2.0), 0.0]);
    }

    #[test]
    fn margins_and_centring_come_where_they_are_asked_for() {
        let rows = [scored(&[0, 1], &[0.5, 0.0])];
        let plain = RewardConfig::default();
        assert_near(&losses(&plain, &[1.0, 0.0], &rows), &[softplus(-1.0)]);
        let with_margin = RewardConfig { use_margin: true, ..plain.clone() };
        assert_near(&losses(&with_margin, &[1.0, 0.0], &rows), &[softplus(-0.5)]);
        let centred = RewardConfig { center_rewards_coefficient: Some(0.01), ..plain };
        assert_near(&losses(&centred, &[2.0, 1.0], &rows), &[softplus(-1.0) + 0.09]);
        // Pairs (0, 1), (0, 2), (1, 2) with sums 3, 1, 0: 10/3 on average.
        let config = RewardConfig { loss: RankingLoss::PlackettLuce, ..centred };
        let list = [2.0, 1.0, -1.0];
        let contests = ((1.0 + (-1f64).exp() + (-3f64).exp()).ln() + softplus(-2.0)) / 2.0;
        assert_near(&losses(&config, &list, &[ranks(&[0, 1, 2])]), &[contests + 0.01 * 10.0 / 3.0]);
    }

    #[test]
    fn plackett_luce_has_each_rank_win_against_the_worse() {
        let of =
            |values_in: &[f64], ranks: &[u32]| values(&plackett_luce_loss(&scores(values_in), ranks).unwrap().view(1));
        // A pair is the pairwise loss; K equal scores pay the mean of ln K, ln(K − 1), .., ln 2.
        assert_near(&of(&[0.3, 1.5], &[1, 0]), &[softplus(-1.2)]);
        assert_near(&of(&[7.0; 4], &[2, 0, 3, 1]), &[24f64.ln() / 3.0]);
        // Two best of one rank each win against the worst alone; ties throughout say nothing.
        assert_near(&of(&[1.0, 2.0, 0.0], &[0, 0, 1]), &[(softplus(-1.0) + softplus(-2.0)) / 2.0]);
        assert_near(&of(&[1.0, 2.0], &[0, 0]), &[0.0]);
        // Tied in the middle: 0 against all, 1 and 2 against 3 only.
        let first = (1.0 + 2.0 * (-1f64).exp() + (-3f64).exp()).ln();
        assert_near(&of(&[3.0, 2.0, 2.0, 0.0], &[0, 1, 1, 2]), &[(first + 2.0 * softplus(-2.0)) / 3.0]);
        // Scores that overflow alone stay finite.
        assert_near(&of(&[900.0, 899.0, -900.0], &[0, 1, 2]), &[softplus(-1.0) / 2.0]);
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let judgements = [ranks(&[1, 0, 1, 2]), scored(&[0, 1], &[0.7, 0.2]), ranks(&[0, 0])];
        let point = [0.3, -0.4, 1.1, 0.2, -0.5, 0.6, 0.1, 0.9];
        for config in [
            RewardConfig::default(),
            RewardConfig { center_rewards_coefficient: Some(0.1), use_margin: true, ..Default::default() },
            RewardConfig {
                loss: RankingLoss::PlackettLuce,
                center_rewards_coefficient: Some(0.1),
                ..Default::default()
            },
        ] {
            let leaf = scores(&point).set_requires_grad(true);
            let all: Vec<&Judgement> = judgements.iter().collect();
            ranking_losses(&leaf, &all, &config).unwrap().losses.sum(Kind::Double).backward();
            let gradient = values(&leaf.grad());
            for index in 0..point.len() {
                let at = |step: f64| {
                    let mut moved = point;
                    moved[index] += step;
                    losses(&config, &moved, &judgements).iter().sum::<f64>()
                };
                let difference = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!((gradient[index] - difference).abs() < 1e-9, "{config:?} {index}: {gradient:?} {difference}");
            }
            // The tied prompt is not moved, but by centring nothing pulls it either: it has no pair.
            assert_eq!(gradient[6..], [0.0, 0.0]);
        }
    }

    #[test]
    fn pairs_come_back_with_their_prompts() {
        let judgements = [ranks(&[0, 1]), ranks(&[2, 0, 1])];
        let all: Vec<&Judgement> = judgements.iter().collect();
        let out = ranking_losses(&scores(&[1.0, 2.0, 3.0, 4.0, 5.0]), &all, &RewardConfig::default()).unwrap();
        assert_eq!(out.prompt_of_pair, [0, 1, 1, 1]);
        assert_near(&values(&out.chosen_scores), &[1.0, 4.0, 5.0, 4.0]);
        assert_near(&values(&out.rejected_scores), &[2.0, 3.0, 3.0, 5.0]);
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let pair = ranks(&[0, 1]);
        let error = |judgement: &Judgement, count: usize| {
            let scores = scores(&vec![0.0; count]);
            ranking_losses(&scores, &[judgement], &RewardConfig::default()).unwrap_err().to_string()
        };
        assert_eq!(error(&pair, 3), "`scores` is [3] of Double, expected [2], one for each rank");
        assert!(error(&Judgement::Labels(vec![true]), 1).contains("labels of single completions"));
        let wrong = pairwise_losses(&scores(&[1.0]), &scores(&[1.0, 2.0]), None).unwrap_err().to_string();
        assert_eq!(wrong, "`rejected_scores` is [2] of Double, expected [1], as `chosen_scores`");
        assert!(pairwise_losses(&scores(&[1.0]), &scores(&[1.0]), Some(&scores(&[1.0, 2.0]))).is_err());
        assert!(plackett_luce_loss(&scores(&[1.0]), &[0, 1]).is_err());
    }
}
