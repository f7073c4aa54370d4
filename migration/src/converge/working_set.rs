//! How large a part of memory the guest writes to, and how often, learnt while round 1 sends all of it.
//!
//! In round 1 the rate of newly dirtied pages cannot exceed the rate at which pages are sent, however wild the
//! guest is, and starts at nothing, however wild it is: only pages that were sent can be dirtied again. What
//! tells guests apart is how soon that happens. The model: a share of the pages is *hot*, and each hot page
//! that is clean is written to with a constant probability per second. For each of a row of such
//! frequencies the pages dirtied are followed step by step, as if all pages were hot; least squares then give
//! the hot share, and the frequency that fits best.
//!
//! Pages that were found to be written all the time before round 1 are no part of this: the engine sends them last.

use super::estimate::ObservedStep;

/// The fits of all frequencies.
#[derive(Clone, Debug)]
pub(super) struct WorkingSet {
    fits: Vec<Fit>,
    sent: f64,
    dirtied: f64,
    /// Sum of the squares of `dirtied`.
    square: f64,
}

/// One frequency.
#[derive(Clone, Copy, Debug, Default)]
struct Fit {
    /// Writes per second to each page.
    frequency: f64,
    /// Bytes sent and not written to since, were all pages hot.
    clean: f64,
    /// Bytes dirtied again, were all pages hot.
    again: f64,
    /// Sum of `again` × what was dirtied in fact.
    cross: f64,
    /// Sum of the squares of `again`.
    square: f64,
}

/// The model that fits best.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Model {
    /// Writes per second to each hot page.
    pub frequency: f64,
    /// Share of the pages that is hot.
    pub share: f64,
    /// Hot bytes that are clean now.
    pub clean: f64,
}

impl WorkingSet {
    const FREQUENCIES: i32 = 28;
    const LOWEST: f64 = 0.03;
    const RATIO: f64 = 1.35;
    /// Dirtied bytes below which there is nothing to fit.
    const MIN_DIRTIED: f64 = 1024.0 * 1024.0;

    pub(super) fn new() -> Self {
        let fit = |n| Fit {
            frequency: Self::LOWEST * Self::RATIO.powi(n),
            ..Fit::default()
        };
        Self {
            fits: (0..Self::FREQUENCIES).map(fit).collect(),
            sent: 0.0,
            dirtied: 0.0,
            square: 0.0,
        }
    }

    /// Takes a step of round 1; `on` is the share of it that the guest ran.
    pub(super) fn add(&mut self, step: &ObservedStep, on: f64) {
        self.sent += step.data;
        self.dirtied += step.dirtied;
        self.square += self.dirtied * self.dirtied;
        for fit in &mut self.fits {
            let before = fit.clean;
            fit.clean = clean_after(fit.frequency, before, step.data, step.elapsed * on);
            fit.again += before + step.data - fit.clean;
            fit.cross += fit.again * self.dirtied;
            fit.square += fit.again * fit.again;
        }
    }

    /// The best fit; `None` where hardly anything was dirtied yet.
    pub(super) fn model(&self) -> Option<Model> {
        if self.dirtied < Self::MIN_DIRTIED {
            return None;
        }
        let best = self.fits.iter().filter(|fit| fit.square > 0.0).map(|fit| {
            let share = (fit.cross / fit.square).clamp(0.0, 1.0);
            let error = self.square - 2.0 * share * fit.cross + share * share * fit.square;
            (
                error,
                Model {
                    frequency: fit.frequency,
                    share,
                    clean: share * fit.clean,
                },
            )
        });
        best.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, model)| model)
    }

    /// Bytes of the steps so far.
    pub(super) fn sent(&self) -> f64 {
        self.sent
    }

    /// Bytes of the working set, if the rest of memory (`unsent` bytes) is like the part that was sent.
    pub(super) fn size(&self, model: Model, unsent: f64) -> f64 {
        model.share * (self.sent + unsent)
    }
}

impl Model {
    /// That of a guest that writes nothing.
    pub(super) const QUIET: Self = Self {
        frequency: 0.0,
        share: 0.0,
        clean: 0.0,
    };

    /// Whether observations every 10 ms can tell this frequency from a higher one.
    pub(super) fn is_resolved(&self) -> bool {
        self.frequency < 20.0
    }

    /// Bytes that will be dirtied again while `data` more bytes are sent in `elapsed` seconds.
    pub(super) fn again(&self, data: f64, elapsed: f64) -> f64 {
        let sent = self.share * data;
        (self.clean + sent - clean_after(self.frequency, self.clean, sent, elapsed)).max(0.0)
    }
}

/// Bytes that will be dirtied again of those that are written all the time, while so many are sent in `elapsed` seconds.
pub(super) fn again_of_hot(data: f64, elapsed: f64) -> f64 {
    data - clean_after(HOT_FREQUENCY, 0.0, data, elapsed)
}

/// Writes per second to each page that was found to be written all the time: it was once in 20 ms, and again in 10 ms.
pub(super) const HOT_FREQUENCY: f64 = 100.0;

/// Bytes clean after `elapsed` seconds, during which `sent` bytes became clean at a constant rate.
fn clean_after(frequency: f64, clean: f64, sent: f64, elapsed: f64) -> f64 {
    let writes = frequency * elapsed;
    if writes < 1e-9 {
        return clean + sent;
    }
    let left = (-writes).exp();
    clean * left + sent * (1.0 - left) / writes
}
