//! The guide's chapter on streams.

use std::time::Duration;

use kafold::prelude::*;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, DomainEvent, Serialize, Deserialize)]
#[event(category = "search")]
enum SearchEvent {
    #[event("search.made")]
    Made { query: String, at: Timestamp },
}

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);

/// How often each query was made in each hour.
#[derive(Clone, Debug, PartialEq, Row)]
struct Trending {
    #[row(key)]
    query: String,
    #[row(sum, index)]
    searches: i64,
}

impl Windowed for Trending {
    const NAME: &'static str = "trending";
    const WINDOW: Window = Window::tumbling(HOUR).grace(Duration::from_secs(5 * 60));
    const PLACE: Place = Place::Spread;
    type Event = SearchEvent;

    fn at(event: &Recorded<SearchEvent>) -> Timestamp {
        let SearchEvent::Made { at, .. } = event.event;
        at
    }

    fn keys(event: &Recorded<SearchEvent>) -> Vec<String> {
        let SearchEvent::Made { query, .. } = &event.event;
        vec![query.clone()]
    }

    fn fold(query: &String, row: Option<Self>, _: &Recorded<SearchEvent>) -> Self {
        let searches = row.map_or(0, |row| row.searches);
        Self { query: query.clone(), searches: searches + 1 }
    }
}

fn made(query: &str, at: Timestamp) -> SearchEvent {
    SearchEvent::Made { query: query.to_owned(), at }
}

#[test]
fn a_search_after_the_grace_is_late() {
    let nine: Timestamp = "2026-01-01T09:00:00Z".parse().expect("a time");
    let count = |query: &str, searches| (nine, Trending { query: query.to_owned(), searches });
    stream_test::<Trending>()
        .feed([made("car", nine + 10 * MINUTE), made("car", nine + 59 * MINUTE)])
        .feed([made("tea", nine + 30 * MINUTE)])
        .advance_to(nine + HOUR + 5 * MINUTE)
        .feed([made("tea", nine + 31 * MINUTE)])
        .rows([count("car", 2), count("tea", 1)])
        .late(1)
        .closed([nine]);
}

#[derive(Clone, Default)]
struct Searches;

impl Aggregate for Searches {
    type Command = SearchEvent;
    type Event = SearchEvent;
    type Error = Never;

    fn decide(&self, made: &SearchEvent) -> Result<Vec<SearchEvent>, Never> {
        Ok(vec![made.clone()])
    }

    fn evolve(&mut self, _: &SearchEvent) {}
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize, thiserror::Error)]
enum Never {}

#[tokio::test]
async fn the_first_query_of_an_hour_is_final() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let log = format!("sqlite://{}", folder.path().join("searches.db").display());
    let kafold = kafold::open(log).await?;
    kafold.projections().with_windows::<Trending>().spawn();
    let searches = kafold.handler::<Searches>();
    let nine: Timestamp = "2026-01-01T09:00:00Z".parse()?;
    for (user, query) in [("ada", "car"), ("bob", "tea"), ("cem", "car")] {
        searches.handle(user, &made(query, nine + MINUTE)).await?;
    }
    for position in kafold.advance_clock("trending", nine + HOUR + 5 * MINUTE).await? {
        kafold.wait_for_position("trending", position, MINUTE).await?;
    }
    let first = kafold.windows::<Trending>().top(nine, Trending::searches, 1).await?;
    assert_eq!(first[0].row, Trending { query: "car".to_owned(), searches: 2 });
    assert!(first[0].is_final);
    kafold.close().await;
    Ok(())
}
