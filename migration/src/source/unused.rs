//! Asks the guest which pages it does not use and leaves them out of the first round.
//!
//! Must not leave out a page that was written after the guest reported it: the dirty log decides that, not the guest.

use std::time::Duration;

use super::crew::Crew;
use super::{MigrateError, SourceJob};
use crate::page_set::PageSet;

/// The longest that the guest may take to report its unused pages. Most guests need far less; some fill each page with
/// zeroes first.
const MAX_REPORT_TIME: Duration = Duration::from_secs(2);
/// The report may also take no more than this part (one in so many) of the time that is left before the deadline.
const DEADLINE_SHARE: u32 = 20;

impl SourceJob<'_> {
    /// Removes from `populated`, the pages of the first round, those that the guest reports as unused, and returns
    /// them. They count as zero until they are written.
    ///
    /// All marks are cleared before the guest is asked. So a page that it reports and that is not marked afterwards was
    /// not written since the guest stopped using it. A page that is written later is marked, and sent then.
    pub(super) fn exclude_unused(
        &mut self,
        crew: &Crew<'_>,
        populated: &mut PageSet,
    ) -> Result<PageSet, MigrateError> {
        let mut unused = PageSet::of(crew.space.memory)?;
        let left = self
            .options
            .deadline
            .map(|deadline| deadline.saturating_sub(self.started.elapsed()));
        let at_most = left.map_or(MAX_REPORT_TIME, |left| MAX_REPORT_TIME.min(left / DEADLINE_SHARE));
        let pages = populated.len();
        if !self.call("has_unused", |source| source.has_unused(pages, at_most))? {
            return Ok(unused);
        }
        crew.space.clear_all(populated)?;
        self.call("unused", |source| source.unused(at_most, &mut unused))?;
        let mut marked = PageSet::of(crew.space.memory)?;
        crew.space.peek_ram(&mut marked)?;
        unused.subtract(&marked);
        populated.subtract(&unused);
        self.report.pages_unused = pages - populated.len();
        tracing::debug!(pages = self.report.pages_unused, "unused by the guest");
        Ok(unused)
    }
}
