//! What `GET /balloon/statistics` answers.

use std::time::{Duration, Instant};

use api::{BalloonStatistics, GuestMemoryStatistics};
use devices::virtio::balloon::{BalloonControl, PAGE_SIZE, Statistics};

/// How long new statistics are waited for; a guest that is busy sends them later.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often the server checks whether they are there.
const INTERVAL: Duration = Duration::from_millis(5);

/// Asks the guest for new statistics, if it ever sent some, and waits a moment for them.
pub(super) async fn statistics(control: &BalloonControl) -> BalloonStatistics {
    let (_, seen) = control.statistics();
    control.request_statistics();
    let begin = Instant::now();
    while seen > 0 && control.statistics().1 == seen && begin.elapsed() < PATIENCE {
        tokio::time::sleep(INTERVAL).await;
    }
    let (target, actual) = (control.target(), control.actual());
    BalloonStatistics {
        target_pages: target / PAGE_SIZE,
        actual_pages: actual / PAGE_SIZE,
        target_mib: target >> 20,
        actual_mib: actual >> 20,
        given_up_bytes: control.given_up(),
        guest: to_api(control.statistics().0.unwrap_or_default()),
    }
}

/// The guest's own figures, as the API has them.
fn to_api(statistics: Statistics) -> GuestMemoryStatistics {
    let Statistics {
        swap_in,
        swap_out,
        major_faults,
        minor_faults,
        free_memory,
        total_memory,
        available_memory,
        disk_caches,
        hugetlb_allocations,
        hugetlb_failures,
    } = statistics;
    GuestMemoryStatistics {
        swap_in,
        swap_out,
        major_faults,
        minor_faults,
        free_memory,
        total_memory,
        available_memory,
        disk_caches,
        hugetlb_allocations,
        hugetlb_failures,
    }
}
