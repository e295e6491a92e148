from tfloop.cli import main

raise SystemExit(main())
